"""The main job on the embedded default: base policy, SFT on the reference paths, SRPO on explored branches, one table.

python scripts/quickstart.py [--workdir=runs/quickstart]        (what `make quickstart` runs)

Both arms start from the same policy and see the same trunks for the same number of updates. Killed, the same command goes on.
"""

import time

import jax
from absl import flags
from ml_collections import config_flags

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.combs import explored_combs, write_combs
from srpo_jax.evaluation.evaluate import evaluate
from srpo_jax.evaluation.generate import encode_prompts
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.results import add_result, render
from srpo_jax.training.loop import train
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to run.", lock_config=True)
TREES = 48
"""Explored trees in the report, about."""
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where to keep everything; the same command resumes it.")


def main(_):
    begin = time.time()
    base = CONFIG.value
    section = configs.eval_section(base)
    decodings = evaluation.decodings(section)
    evaluator = evaluation.build_evaluator(section)
    mesh = configs.build_mesh(base)
    arms = {name: prepare(base, changes, mesh) for name, changes in arms_of(base).items()}
    tests = evaluation.build_benchmark(section, configs.build_difficulty(base))
    records = configs.build_records(base)
    workdir = open_workdir(WORKDIR.value, base)  # what cannot run leaves none behind
    policy = configs.build_policy(base, mesh)
    prompts = encode_prompts(tests, policy.processor)
    references = reference_rows(tests, evaluator, workdir / "evaluation")

    def report(name, params, step, judge=""):
        options = {"name": name, "step": step, "prompts": prompts, "training_judge": judge}
        for decoding in decodings:
            entry = evaluate(policy, params, tests, evaluator, decoding, workdir / "evaluation", **options)
            results = add_result(workdir / "results.json", entry, references)
        return results

    report("base", policy.params, 0)
    for name, (config, run, judge) in arms.items():
        params = train(policy, records, judge, run, open_workdir(workdir / name.lower(), config), mesh)
        results = report(name, params, run.updates * max(1, run.rounds), config.judge if run.rounds else "")
        if run.rounds:
            explored = workdir / name.lower() / "trees" / f"round_{run.rounds - 1:03d}"
            judged = {
                "judge_steps": evaluator.steps,
                "step_judge": evaluator.name,
                "favourable": run.explore.favourable,
            }
            folder, title = workdir / "evaluation", f"{name}, last exploration"
            trees = explored_combs(explored, records, policy.processor, folder, title=title, limit=TREES, **judged)
            write_combs(folder, name.lower(), trees)
    print(render(results))
    print(
        f"{time.time() - begin:.0f} s on {jax.device_count()} {jax.devices()[0].device_kind}; see {write_report(workdir)}, "
        f"and {workdir}/sft and {workdir}/srpo for metrics, trees and checkpoints"
    )


def arms_of(base):
    """What each arm changes; both make the same number of updates."""
    updates = base.updates * max(1, base.rounds)
    return {"SFT": {"rounds": 0, "loss.weights.srpo": 0.0, "loss.weights.sft": 1.0, "updates": updates}, "SRPO": {}}


def prepare(base, changes, mesh):
    """The configuration of an arm, checked, and its judge."""
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    run = configs.run_config(config)
    configs.check_batch(run, mesh)
    return config, run, configs.build_judge(config) if run.rounds else None


if __name__ == "__main__":
    cli.run(main)
