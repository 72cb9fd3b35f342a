"""Reading what a run left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import ml_collections

from srpo_jax import config as configs
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.models.hf import param_shapes, read_config
from srpo_jax.models.policy import Policy
from srpo_jax.training import workdir
from srpo_jax.training.state import abstract_state


def is_run(path: str | Path) -> bool:
    """Whether `path` is a work directory of training, not a Hugging Face folder (both hold a config.json)."""
    return (Path(path) / "checkpoints").is_dir() and (Path(path) / workdir.CONFIG_FILE).is_file()


def training_judge(path: str | Path) -> str:
    """Name of the judge that chose a run's favourable branches, as its configuration tells it; "" if it explored nothing.

    Raises:
      WorkdirError, OSError: there is no readable configuration.
    """
    config = workdir.read_config(path)
    return config["judge"] if config["rounds"] else ""


def load_run(path: str | Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Policy, int]:
    """The policy of a work directory at `step` (the newest checkpoint if None), and that step.

    Changes nothing there and needs no lock: the run may be under way.

    Raises:
      FileNotFoundError: no work directory there.
      checkpoint.CheckpointError: no checkpoint, or not that one.
    """
    path = Path(path)
    if not is_run(path):
        raise FileNotFoundError(f"{path}: no work directory of a training run (config.json and checkpoints/)")
    config = configs.default_config()
    with config.unlocked():  # a recipe may keep sections of its own
        config.update(ml_collections.ConfigDict(workdir.read_config(path)))
    mesh = configs.build_mesh(config) if mesh is None else mesh
    run = configs.run_config(config)
    start = configs.build_policy(config, mesh)
    shapes = param_shapes(read_config(configs.policy_path(config.policy.path)))
    shapes = jax.tree.map(lambda shape, x: jax.ShapeDtypeStruct(shape.shape, x.dtype), shapes, start.params)
    start = dataclasses.replace(start, params={})  # they told their dtypes; room for the trained ones
    like = abstract_state(shapes, run.optim.make(), run.trainable, mesh)
    like = like._replace(opt_state=jax.tree.map(lambda _: ..., like.opt_state))
    with Checkpointer(path / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(step, like)
    return dataclasses.replace(start, params=state.all_params()), int(state.step)
