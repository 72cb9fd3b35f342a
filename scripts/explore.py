"""Explores branches of reference paths with a policy and judges them; resumes by itself.

python scripts/explore.py --config=configs/quickstart.py --workdir=runs/trees [--checkpoint=runs/srpo]

Writes trees/branches.jsonl and trees/verdicts.jsonl to the work directory and prints what the branches are like, by prefix.
"""

import json

import jax
from absl import flags
from ml_collections import config_flags

import srpo_jax as sx
from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.exploration.explorer import exploration_statistics
from srpo_jax.runs import is_run, load_run
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to explore.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep the trees; the same command resumes.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Hugging Face folder or training run; default: config.policy.")


def main(_):
    config = CONFIG.value
    if CHECKPOINT.value:
        config.policy.path = CHECKPOINT.value  # so that the work directory remembers whose branches it holds
    run = configs.run_config(config)
    judge = configs.build_judge(config)
    workdir = open_workdir(WORKDIR.value, config)
    mesh = configs.build_mesh(config)
    path = config.policy.path
    policy = load_run(path, mesh=mesh)[0] if is_run(path) else configs.build_policy(config, mesh)
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
    print(json.dumps(statistics, indent=2))
    print("prefix  branches  favourable")
    for prefix in trees[0].trunk.prefixes:
        verdicts = [b.verdict for tree in trees for b in tree.branches if b.prefix == prefix and b.verdict is not None]
        print(f"{prefix:6d}  {len(verdicts):8d}  {sum(verdicts) / max(1, len(verdicts)):10.1%}")


if __name__ == "__main__":
    cli.run(main)
