"""Judges responses that another system generated, and adds a row to results.json and the report.

python scripts/score.py --config=configs/quickstart.py --workdir=DIR --responses=FILE --name=NAME [--judge=...]

FILE has one JSON object per line: {"id": "...", "text": "<think>...</think>...", "sample": 0, "stopped": true}; the last two
may be left out. Every question needs a response. Questions come from the `eval` section of the configuration: records, or one
published benchmark (--benchmark, --data_root).
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.evaluation.evaluate import score
from srpo_jax.evaluation.interop.responses import digest, read_responses
from srpo_jax.evaluation.judging import benchmark_digest
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.results import add_result, read_results, render
from srpo_jax.evaluation.tasks import DataOptions, build_tasks
from srpo_jax.files import lock_folder

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What was asked.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep verdicts and results.json.", required=True)
RESPONSES = flags.DEFINE_string("responses", None, "JSON lines to judge.", required=True)
NAME = flags.DEFINE_string("name", None, "Of the row in the table.", required=True)
JUDGE = flags.DEFINE_string("judge", None, "Who judges; default: config.eval.evaluator.")
BENCHMARK = flags.DEFINE_string("benchmark", None, "What was asked; default: the first of config.eval.benchmarks.")
ROOT = flags.DEFINE_string("data_root", "data", "Folder of the published benchmarks, each in a folder of its name.")


def main(_):
    section, folder = configs.eval_section(CONFIG.value), Path(WORKDIR.value) / "evaluation"
    section.evaluator = JUDGE.value or section.evaluator
    section.benchmarks = (BENCHMARK.value or section.benchmarks[0],)
    [task] = build_tasks(section, DataOptions(ROOT.value), configs.build_difficulty(CONFIG.value), folder)
    responses = read_responses(RESPONSES.value, task.questions)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    row = {
        "name": NAME.value,
        "step": 0,
        **({"task": task.benchmark.name} if task.benchmark else {}),
        "evaluator": task.evaluator.name,
        "decoding": {"imported": digest(RESPONSES.value)},
        "benchmark": benchmark_digest(task.questions),
    }
    row |= score(responses, task.questions, task.evaluator, row, folder, benchmark=task.benchmark, plain=section.plain)
    references = reference_rows(task.questions, task.evaluator, folder, task.benchmark)
    add_result(Path(WORKDIR.value) / "results.json", row | {"data": task.data}, references)
    print(render(read_results(Path(WORKDIR.value) / "results.json")))
    print(f"{len(responses)} responses, evaluator {task.evaluator.name}; see {write_report(WORKDIR.value)}")


if __name__ == "__main__":
    cli.run(main)
