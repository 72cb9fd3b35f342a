"""Evaluates a policy: S, E, S&E on risky prompts, helpfulness and over-refusal on harmless ones, of answer and path.

python scripts/evaluate.py --config=configs/quickstart.py --workdir=runs/eval --checkpoint=FOLDER [--name=NAME]

FOLDER is a work directory of training or a checkpoint in Hugging Face's format. One workdir may collect several policies:
each adds its rows to results.json. Killed, the same command goes on.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from srpo_jax import cli, distributed
from srpo_jax import config as configs
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.evaluate import evaluate, reference_rows
from srpo_jax.evaluation.generate import encode_prompts
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.results import add_result, read_results, render
from srpo_jax.files import lock_folder
from srpo_jax.runs import is_run, load_run, training_judge

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep responses, verdicts and results.json.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Policy to evaluate; default: the one of the configuration.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a work directory; default: the newest.")
NAME = flags.DEFINE_string("name", None, "Of its rows in the table; default: the folder's name.")


def main(_):
    config = CONFIG.value
    section = configs.eval_section(config)
    decodings = evaluation.decodings(section)
    records = evaluation.build_benchmark(section, configs.build_difficulty(config))
    evaluator = evaluation.build_evaluator(section)
    policy, step = load(config)
    judge = training_judge(CHECKPOINT.value) if CHECKPOINT.value and is_run(CHECKPOINT.value) else None
    prompts = encode_prompts(records, policy.processor)
    references = reference_rows(records, evaluator)
    name = NAME.value or Path(CHECKPOINT.value or config.policy.path).absolute().name
    workdir = Path(WORKDIR.value)
    distributed.on_lead(lambda: take(workdir / "evaluation"))
    for decoding in decodings:
        options = {"name": name, "step": step, "prompts": prompts, "training_judge": judge}
        entry = evaluate(policy, policy.params, records, evaluator, decoding, workdir / "evaluation", **options)
        if distributed.is_lead():
            add_result(workdir / "results.json", entry, references)
    if distributed.is_lead():
        write_report(workdir)
    cli.say(render(read_results(workdir / "results.json")) if distributed.is_lead() else "")
    cli.say(f"{len(records)} prompts, evaluator {evaluator.name}, step {step}; see {workdir}/report.html")


def take(folder):
    """The folder alone is ours, not the work directory: that may be of a run under way."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)


def load(config):
    """The policy, and the step of training that it comes from."""
    mesh = configs.build_mesh(config)
    if CHECKPOINT.value and is_run(CHECKPOINT.value):
        return load_run(CHECKPOINT.value, STEP.value, mesh)
    if STEP.value is not None:
        raise app.UsageError("--step chooses a checkpoint of a work directory of training; --checkpoint is none")
    if CHECKPOINT.value:
        config = config.copy_and_resolve_references()
        config.policy.path = CHECKPOINT.value
    return configs.build_policy(config, mesh), 0


if __name__ == "__main__":
    cli.run(main)
