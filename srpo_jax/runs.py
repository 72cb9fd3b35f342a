"""Reading what a run left behind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from srpo_jax import config as configs
from srpo_jax.checkpoint import Checkpointer, CheckpointMismatchError
from srpo_jax.models.fingerprint import params_fingerprint
from srpo_jax.models.hf import read_config
from srpo_jax.models.lora import is_adapter
from srpo_jax.models.peft import base_folder, is_adapter_folder
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor
from srpo_jax.models.remote import is_address
from srpo_jax.training import workdir
from srpo_jax.training.state import abstract_state, place_frozen, select_trainable


def is_run(path: str | Path) -> bool:
    """Whether `path` is a work directory of training, not a Hugging Face folder (both hold a config.json)."""
    if not (Path(path) / workdir.CONFIG_FILE).is_file():
        return False
    with contextlib.suppress(workdir.WorkdirError):
        return (Path(path) / "checkpoints").is_dir() or bool(workdir.read_config(path).get("checkpoints"))
    return False


def training_judge(path: str | Path) -> str:
    """Name of the judge that chose a run's favourable branches, as its configuration tells it; "" if it explored nothing.

    Raises:
      WorkdirError, OSError: there is no readable configuration.
    """
    config = workdir.read_config(path)
    return config["judge"] if config["rounds"] else ""


def run_settings(path: str | Path) -> ml_collections.ConfigDict:
    """The configuration that a work directory was made with, fields added since at their defaults.

    Raises:
      FileNotFoundError: no work directory there.
    """
    if not is_run(path):
        raise FileNotFoundError(f"{path}: no work directory of a training run (config.json and checkpoints/)")
    return workdir_settings(path)


def workdir_settings(path: str | Path) -> ml_collections.ConfigDict:
    """As `run_settings`, of any work directory: one of exploration has no checkpoints.

    Raises:
      OSError, WorkdirError: there is no readable configuration.
    """
    config = configs.default_config()
    with config.unlocked():  # a recipe may keep sections of its own
        config.update(ml_collections.ConfigDict(workdir.read_config(path)))
    return config


def adapter_base(path: str | Path, params: Mapping[str, Any]) -> str:
    """Folder or address of the model that the adapters of a run belong to.

    Args:
      path: work directory of the run.
      params: of the run's policy.

    Raises:
      ValueError: the run trained more than adapters, so that these alone are not its policy.
    """
    config = run_settings(path)
    trained, _ = select_trainable(dict(params), configs.run_config(config).trainable)
    if others := sorted(name for name in trained if not is_adapter(name)):
        raise ValueError(
            f"{path} trained {', '.join(others[:3])} beside adapters, if any; export it whole, without --adapter"
        )
    start = configs.policy_path(config.policy.path)
    base = base_folder(start, config.policy.base) if is_adapter_folder(start) else start
    return str(base if is_address(base) else base.absolute())


def load_processor(config: ml_collections.ConfigDict) -> Processor:
    """The processor of the policy that a configuration starts from, without any parameters.

    Raises:
      FileNotFoundError, ValueError: see `models.policy.load_policy`.
    """
    start = configs.policy_path(config.policy.path)
    if is_run(start):
        return load_processor(run_settings(start))
    folder = base_folder(start, config.policy.base) if is_adapter_folder(start) else start
    return Processor.load(folder, read_config(folder))


def load_run(path: str | Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Policy, int]:
    """The policy of a work directory at `step` (the newest checkpoint if None), and that step.

    Changes nothing there and needs no lock: the run may be under way. Heads that an objective trained beside the policy
    (`models.heads`) are no part of it and stay there.

    Raises:
      FileNotFoundError: no work directory there.
      checkpoint.CheckpointError: no checkpoint, or not that one.
      checkpoint.CheckpointMismatchError: a checkpoint of another model, or the frozen parameters have changed since.
    """
    config = run_settings(path)
    path = Path(path)
    mesh = configs.build_mesh(config) if mesh is None else mesh
    run = configs.run_config(config)
    start = configs.build_policy(config, mesh)
    own = run.loss.parameters(start.config.text.hidden_size)
    like = abstract_state(start.params, run.optim.make(), run.trainable, mesh, own=own)
    frozen = place_frozen(start.params, like.frozen)
    start = dataclasses.replace(start, params={})  # room for the trained ones
    wanted: dict[str, Any] = {path: ... if path in own else x for path, x in like.params.items()}
    like = like.moving()._replace(params=wanted, opt_state=jax.tree.map(lambda _: ..., like.opt_state))
    with Checkpointer(run.checkpoints or path / "checkpoints", read_only=True) as checkpoints:
        state, metadata = checkpoints.restore(step, like)
    if metadata.get("frozen") != params_fingerprint(frozen):
        raise CheckpointMismatchError(
            f"{path} was trained from other frozen parameters than {config.policy.path} holds now; put that policy back there"
        )
    return dataclasses.replace(start, params=state._replace(frozen=frozen).all_params()), int(state.step)
