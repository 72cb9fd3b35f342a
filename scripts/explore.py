"""Explores branches of reference paths with a policy and judges them; resumes by itself.

python scripts/explore.py --config=configs/quickstart.py --workdir=runs/trees [--checkpoint=runs/srpo] [--step=64]

Writes trees/branches.jsonl and trees/verdicts.jsonl to the work directory and prints what the branches are like, by prefix.
The work directory remembers the step of training that it explores, however far the run has gone since.
"""

import json
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

import srpo_jax as sx
from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.exploration.explorer import exploration_statistics
from srpo_jax.runs import is_run, load_run
from srpo_jax.training.workdir import CONFIG_FILE, open_workdir, read_config

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to explore.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep the trees; the same command resumes.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Hugging Face folder or training run; default: config.policy.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a training run; default: the newest when first started.")


def main(_):
    config = CONFIG.value
    if CHECKPOINT.value:
        config.policy.path = CHECKPOINT.value  # so that the work directory remembers whose branches it holds
    run = configs.run_config(config)
    judge = configs.build_judge(config, WORKDIR.value)
    policy = load(config, configs.build_mesh(config))
    workdir = open_workdir(WORKDIR.value, config)
    records = configs.build_records(config)
    trees = sx.explore(
        policy,
        policy.params,
        records,
        run.explore,
        judge,
        jax.random.key(run.seed),
        folder=workdir / "trees",
    )
    statistics = exploration_statistics(trees, {record.id: record.risky for record in records})
    cli.say(json.dumps(statistics, indent=2))
    cli.say("prefix  branches  favourable")
    for prefix in trees[0].trunk.prefixes:
        verdicts = [b.verdict for tree in trees for b in tree.branches if b.prefix == prefix and b.verdict is not None]
        cli.say(f"{prefix:6d}  {len(verdicts):8d}  {sum(verdicts) / max(1, len(verdicts)):10.1%}")


def load(config, mesh):
    """The policy; that of a training run leaves its step in the configuration."""
    path = config.policy.path
    if not is_run(path):
        if STEP.value is not None:
            raise app.UsageError(f"--step chooses a checkpoint of a training run; {path} is none")
        return configs.build_policy(config, mesh)
    step, known = STEP.value, Path(WORKDIR.value) / CONFIG_FILE
    if step is None and known.is_file():
        step = read_config(known.parent).get("checkpoint_step")
    policy, found = load_run(path, step, mesh)
    with config.unlocked():
        config.checkpoint_step = found
    return policy


if __name__ == "__main__":
    cli.run(main)
