"""The main job on the embedded default: base policy, SFT on the reference paths, SRPO on explored branches, one table.

python scripts/quickstart.py [--workdir=runs/quickstart]        (what `make quickstart` runs)

Both arms start from the same policy and see the same trunks for the same number of updates. Killed, the same command goes on.
"""

import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from srpo_jax import config as configs
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.evaluate import evaluate, reference_rows
from srpo_jax.evaluation.generate import encode_prompts
from srpo_jax.evaluation.results import add_result, render
from srpo_jax.training.loop import train
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where to keep everything; the same command resumes it.")

ARMS = {"SFT": {"rounds": 0, "loss.lambda_": 0.0}, "SRPO": {}}


def main(_):
    begin = time.time()
    base = CONFIG.value
    workdir = open_workdir(WORKDIR.value, base)
    mesh = configs.build_mesh(base)
    policy = configs.build_policy(base, mesh)
    records = configs.build_records(base)
    tests = evaluation.build_benchmark(base.eval)
    prompts = encode_prompts(tests, policy.processor)
    evaluator = evaluation.build_evaluator(base.eval)
    references = reference_rows(tests, evaluator)

    def report(name, params, step):
        for decoding in evaluation.decodings(base.eval):
            entry = evaluate(
                policy,
                params,
                tests,
                evaluator,
                decoding,
                workdir / "evaluation",
                name=name,
                step=step,
                prompts=prompts,
            )
            results = add_result(workdir / "results.json", entry, references)
        return results

    report("base", policy.params, 0)
    for name, changes in ARMS.items():
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        run = configs.run_config(config)
        judge = configs.build_judge(config) if run.rounds else None
        arm = open_workdir(workdir / name.lower(), config)
        params = train(policy, records, judge, run, arm, mesh)
        results = report(name, params, run.updates)
    print(render(results))
    print(
        f"{time.time() - begin:.0f} s on {jax.device_count()} {jax.devices()[0].device_kind}; see {workdir}/results.json"
    )
    logging.flush()


if __name__ == "__main__":
    app.run(main)
