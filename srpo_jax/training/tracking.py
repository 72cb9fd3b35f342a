"""Weights & Biases beside the logs of a work directory, for those who want it (extra `wandb`)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from srpo_jax import distributed
from srpo_jax.training.workdir import Tracker


@contextlib.contextmanager
def weights_and_biases(project: str, workdir: str | Path, config: Mapping[str, Any]) -> Iterator[Tracker | None]:
    """A run of `project` that a restarted job goes on with; the lead process alone has one, the others get None.

    Updates that a resumed job makes again have the same numbers; Weights & Biases warns and keeps the first. Its own variables
    apply, such as `WANDB_MODE=offline` for hosts without a network.

    Args:
      project: where the run appears.
      workdir: names the run, and holds its files.
      config: shown with it.

    Raises:
      ImportError: the package is not installed.
    """
    if not distributed.is_lead():
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb needs the package: pip install 'srpo_jax[wandb]'") from error
    workdir = Path(workdir).absolute()
    name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
    shown, place = dict(config), str(workdir)
    with wandb.init(project=project, id=name, name=workdir.name, resume="allow", config=shown, dir=place) as run:
        yield lambda numbers, step: run.log(dict(numbers), step=step)
