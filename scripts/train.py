"""Trains a policy: explores branches of reference paths, judges them, optimises, checkpoints; resumes by itself.

python scripts/train.py --config=configs/quickstart.py --workdir=runs/srpo [--config.loss.srpo.lambda_=0.5]
"""

import contextlib

from absl import flags
from ml_collections import config_flags

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.training.loop import train
from srpo_jax.training.progress import Profile
from srpo_jax.training.tracking import weights_and_biases
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep the run; the same command resumes it.", required=True)
PROFILE_STEP = flags.DEFINE_integer(
    "profile_step", None, "Trace this update into WORKDIR/profile (TensorBoard reads it)."
)
WANDB = flags.DEFINE_string("wandb", None, "Project of Weights & Biases that is told every number of a step, too.")


def main(_):
    config = CONFIG.value
    run = configs.run_config(config)
    judge = configs.build_judge(config, WORKDIR.value) if run.rounds else None
    mesh = configs.build_mesh(config)
    configs.check_batch(run, mesh)
    workdir = open_workdir(WORKDIR.value, config)  # what cannot run leaves none behind
    policy = configs.build_policy(config, mesh)
    records = configs.build_records(config)
    cli.say(f"{len(records)} records, mesh {dict(mesh.shape)}, policy {config.policy.path}")
    profile = None if PROFILE_STEP.value is None else Profile(PROFILE_STEP.value, workdir / "profile")
    project = WANDB.value
    tracking = weights_and_biases(project, workdir, config.to_dict()) if project else contextlib.nullcontext()
    with tracking as tracker:
        train(policy, records, judge, run, workdir, mesh, profile, donate=True, tracker=tracker)
    cli.say(f"done: metrics, trees and checkpoints are in {workdir}; evaluate or export with --checkpoint={workdir}")


if __name__ == "__main__":
    cli.run(main)
