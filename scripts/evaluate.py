"""Evaluates a policy on records by the RSBench protocol and on published benchmarks: generate, judge, aggregate, all resumable.

    python scripts/evaluate.py --config=configs/rsbench.py --workdir=runs/eval --checkpoint=FOLDER [--judge=JUDGE] \\
        [--benchmarks=rsbench,siuo,think_in_safety] [--data_root=DIR] [--baseline=DIR [--compare]] [--epochs=K] [--limit=N] \\
        [--score_only]
    python scripts/evaluate.py --list

FOLDER is a work directory of training or a checkpoint in Hugging Face's format. One workdir may collect several policies and
judges: each adds its rows to results.json. Killed, the same command goes on; another judge scores what is there.
"""

from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from srpo_jax import cli, distributed
from srpo_jax import config as configs
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.benchmarks.registry import BENCHMARKS, SUITES, listing
from srpo_jax.evaluation.comparison import compare
from srpo_jax.evaluation.evaluate import evaluate, identity
from srpo_jax.evaluation.generate import encode_prompts
from srpo_jax.evaluation.interventions import intervene, render_interventions
from srpo_jax.evaluation.pairwise import biased, compare_answers, render_pairwise
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.results import add_result, check_baseline, read_results, render, thinking_table
from srpo_jax.evaluation.samples import read_samples, samples_name
from srpo_jax.evaluation.tasks import DataOptions, build_tasks, check_pairwise, parse_fields, parse_share
from srpo_jax.files import lock_folder
from srpo_jax.runs import is_run, load_run, training_judge

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep responses, verdicts and results.json.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Policy to evaluate; default: the one of the configuration.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a work directory; default: the newest.")
NAME = flags.DEFINE_string("name", None, "Of its rows in the table; default: the folder's name.")
JUDGE = flags.DEFINE_string("judge", None, "Who judges; default: config.eval.evaluator.")
NAMES = flags.DEFINE_list("benchmarks", None, "What to evaluate (see --list); default: config.eval.benchmarks.")
LIST = flags.DEFINE_bool("list", False, "Print the benchmarks and suites, and end.")
ROOT = flags.DEFINE_string("data_root", "data", "Folder of the published benchmarks, each in a folder of its name.")
HUB = flags.DEFINE_bool("hub", False, "Read benchmarks that can be from the Hugging Face hub instead.")
FIELDS = flags.DEFINE_multi_string(
    "fields", [], "BENCHMARK.FIELD=NAME: a published field has another name in your copy."
)
PARTIAL = flags.DEFINE_bool("partial", False, "Accept incomplete copies of benchmarks; the result says so.")
LIMIT = flags.DEFINE_integer("limit", None, "About so many questions per benchmark, whole clusters.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", None, "Samples per prompt above temperature 0.", lower_bound=1)
SCORE_ONLY = flags.DEFINE_bool("score_only", False, "Judge stored responses; refuse to generate any.")
INTERVENE = flags.DEFINE_bool("interventions", False, "Of records: swap steps and see whether the answer follows.")
FAILURES = flags.DEFINE_string("max_judge_failures", "1%", "Share of responses on which the judge may fail.")
BASELINE = flags.DEFINE_string("baseline", None, "Work directory of an evaluation of the same, to compare with.")
COMPARE = flags.DEFINE_bool(
    "compare", False, "Ask the judge which arm's answer is better, in both orders; needs --baseline."
)


def main(_):
    if LIST.value:
        print(listing())
        return
    if WORKDIR.value is None:
        raise app.UsageError("--workdir is required: where to keep responses, verdicts and results.json")
    if COMPARE.value and not BASELINE.value:
        raise app.UsageError("--compare needs --baseline: the work directory that holds the other arm's answers")
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    section = settings(config)
    decodings = evaluation.decodings(section)
    most = parse_share("--max_judge_failures", FAILURES.value)
    how: dict[str, Any] = {"score_only": SCORE_ONLY.value, "max_judge_failures": most}
    options = DataOptions(ROOT.value, parse_fields(FIELDS.value), PARTIAL.value, HUB.value, LIMIT.value)
    tasks = build_tasks(section, options, configs.build_difficulty(config), workdir / "evaluation")
    if COMPARE.value:
        check_pairwise(tasks)
    planned = [
        identity(task.questions, task.evaluator, decoding, task.benchmark, plain=section.plain)
        for task in tasks
        for decoding in decodings
    ]
    baseline = check_baseline(Path(BASELINE.value) / "results.json", planned) if BASELINE.value else []
    policy, told = load(config)
    distributed.on_lead(lambda: occupy(workdir / "evaluation"))
    rows: list[dict[str, Any]] = []
    for task in tasks:
        prompts = encode_prompts(task.questions, policy.processor)
        references = reference_rows(task.questions, task.evaluator, workdir / "evaluation", task.benchmark)
        for decoding in decodings:
            shown = {**told, "prompts": prompts, "benchmark": task.benchmark, "plain": section.plain, **how}
            folder, asked, who = workdir / "evaluation", task.questions, task.evaluator
            entry = evaluate(policy, policy.params, asked, who, decoding, folder, **shown) | {"data": task.data}
            if INTERVENE.value and task.benchmark is None:
                swapped = intervene(policy, policy.params, asked, who, decoding, prompts, folder, row=entry, **how)
                entry["interventions"] = swapped
            if COMPARE.value and who.pairwise is not None:
                entry["pairwise"] = side_by_side(task, entry, baseline[len(rows)], folder, most)
            rows.append(entry)
            if distributed.is_lead():
                add_result(workdir / "results.json", entry, references)
    if distributed.is_lead():
        show(workdir, section.benchmarks, rows, baseline)
        write_report(workdir)
    judges = ", ".join(dict.fromkeys(task.evaluator.name for task in tasks))
    count = sum(len(task.questions) for task in tasks)
    cli.say(f"{count} prompts, evaluator {judges}, step {told['step']}; see {workdir}/report.html")


def side_by_side(task, entry, theirs, folder, most):
    """What the judge prefers, this row's answers or those of the baseline's row."""
    distributed.barrier()  # the lead writes the samples
    ours = read_samples(folder, samples_name(entry))
    others = read_samples(Path(BASELINE.value or "") / "evaluation", samples_name(theirs))
    options: dict[str, Any] = {"max_judge_failures": most}
    found = compare_answers(task.questions, ours, others, task.evaluator.pairwise, folder, **options)
    return {"baseline": {"name": theirs["name"], "step": theirs.get("step")}, **found}


def occupy(folder):
    """The folder alone is ours, not the work directory: that may be of a run under way."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)


def show(workdir, names, rows, baseline):
    """Prints all results of the work directory, and how those of this call compare with the baseline."""
    results = read_results(workdir / "results.json")
    print(render(results))
    if set(names) & SUITES.keys():
        print(thinking_table(results, {name: one.family for name, one in BENCHMARKS.items()}))
    for row in rows:
        if "interventions" in row:
            print(f"interventions, temperature {row['decoding']['temperature']:g}\n")
            print(render_interventions(row["interventions"]))
    for ours, theirs in zip(rows, baseline, strict=False):
        print(verdict(workdir, ours, Path(BASELINE.value or ""), theirs))
        if "pairwise" in ours:
            print(
                f"\nside by side, in both orders, by {ours['pairwise']['judge']}\n\n{render_pairwise(ours['pairwise'])}"
            )
            print("".join(f"Position bias: {lean}.\n" for lean in biased(ours["pairwise"])), end="")
        elif COMPARE.value:
            print("Answers of a closed form: no judge compares them.")


def settings(config):
    """The `eval` section, with what the flags change."""
    section = configs.eval_section(config)
    section.evaluator = JUDGE.value or section.evaluator
    section.benchmarks = tuple(NAMES.value or section.benchmarks)
    section.samples = EPOCHS.value or section.samples
    if EPOCHS.value and not any(section.temperatures):
        raise app.UsageError("--epochs samples above temperature 0 alone; set --config.eval.temperatures='(1.0,)'")
    return section


def verdict(workdir, ours, other, theirs):
    """What the comparison with the baseline's row says."""
    samples = read_samples(workdir / "evaluation", samples_name(ours))
    others = read_samples(other / "evaluation", samples_name(theirs))
    found = compare(samples, others, names=(ours["name"], theirs["name"]))
    temperature = ours["decoding"]["temperature"]
    return f"{ours.get('task', 'records')}, temperature {temperature:g}: {found['verdict']}"


def load(config):
    """The policy, and what is told of it: its name, its step of training, the judge that trained it."""
    mesh = configs.build_mesh(config)
    name = NAME.value or Path(CHECKPOINT.value or config.policy.path).absolute().name
    if CHECKPOINT.value and is_run(CHECKPOINT.value):
        policy, step = load_run(CHECKPOINT.value, STEP.value, mesh)
        return policy, {"name": name, "step": step, "training_judge": training_judge(CHECKPOINT.value)}
    if STEP.value is not None:
        raise app.UsageError("--step chooses a checkpoint of a work directory of training; --checkpoint is none")
    if CHECKPOINT.value:
        config = config.copy_and_resolve_references()
        config.policy.path = CHECKPOINT.value
    return configs.build_policy(config, mesh), {"name": name, "step": 0}


if __name__ == "__main__":
    cli.run(main)
