"""The work directory of a run: guarded by its configuration, with metrics that match the restored step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_collections
import numpy as np
from tensorboardX import SummaryWriter

from srpo_jax import distributed
from srpo_jax.files import JsonLines, claim, lock_folder, write_json

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
PERFORMANCE_FILE = "performance.jsonl"

_ABSENT = object()


class WorkdirError(ValueError):
    """A work directory that belongs to something else."""


def open_workdir(path: str | Path, config: ml_collections.ConfigDict, *, shared: bool = False) -> Path:
    """Creates the work directory of a run, or opens it again to resume the same run.

    The first call writes `config.json`; later calls compare with it, so that a run never continues under another
    configuration and its results stay attributable. The directory is then this job's own until it ends, however it ends: its
    lead process holds the lock. All processes call this together.

    Args:
      path: the directory; created with its parents if missing.
      config: every field a JSON value.
      shared: let in other jobs that share it, too; they see to it that no two do the same (`files.claim`).

    Returns:
      The directory.

    Raises:
      WorkdirError: if the directory is of another configuration (every differing field is named with both values), if
        it holds files but no `config.json`, or if that file is unreadable.
      files.LockedError: if another process has it open.
      TypeError: if a field of `config` is no JSON value, naming the field.
      OSError: if the directory cannot be made or written.
    """
    if "://" in str(path):
        raise WorkdirError(
            f"{path} is an address; a work directory is a folder that all hosts see, because lines are "
            "appended to its files; checkpoints alone can be there: --config.checkpoints=ADDRESS"
        )
    wanted = _plain(config.to_dict())
    distributed.on_lead(lambda: _open(Path(path), wanted, shared))
    return Path(path)


def _open(path: Path, wanted: dict[str, Any], shared: bool) -> None:
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"{path} is a file; a work directory is needed")
    file = path / CONFIG_FILE
    path.mkdir(parents=True, exist_ok=True)
    # Hidden files are the lock, what a killed atomic write leaves behind, or a file manager's.
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if others and not file.exists():
        raise WorkdirError(
            f"{path} holds {', '.join(others[:5])} but no {CONFIG_FILE}, so it is no work directory; "
            "choose a new or empty directory"
        )
    lock_folder(path, shared=shared)
    with claim(path / ".opening", wait=True):
        if file.exists():
            _compare(wanted, read_config(path), path)
        else:
            write_json(file, wanted)


class NoLog:
    """Where the other processes of a job write metrics: nowhere."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def write_times(self, step: int, values: Mapping[str, float]) -> None: ...


Tracker = Callable[[Mapping[str, Any], int], Any]
"""Takes numbers of a step by name, as `log` of Weights & Biases does."""


def open_log(
    workdir: str | Path, last_step: int = -1, tracker: Tracker | None = None
) -> contextlib.AbstractContextManager[MetricsLog | NoLog]:
    """The `MetricsLog` of a job, which its lead process writes."""
    return MetricsLog(workdir, last_step, tracker) if distributed.is_lead() else contextlib.nullcontext(NoLog())


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard event files of a work directory.

    Opening cuts the file back to the step that was restored, so that a resumed run leaves the same lines as an
    uninterrupted one; TensorBoard is told to hide what came later. Write the metrics of a step before saving the
    checkpoint of that step.

    Args:
      workdir: an existing directory.
      last_step: the restored step; records of later steps are removed. -1 for a run that starts over.
      tracker: is told what TensorBoard is told.
    """

    def __init__(self, workdir: str | Path, last_step: int = -1, tracker: Tracker | None = None):
        self._lines = JsonLines(Path(workdir) / METRICS_FILE)
        self._lines.cut(lambda record: record.get("step", last_step + 1) <= last_step)
        self._times = JsonLines(Path(workdir) / PERFORMANCE_FILE)
        # Event files are named after the second; a restart within it would overwrite the file before.
        suffix = f".{time.time_ns()}"
        self._events = SummaryWriter(str(workdir), purge_step=last_step + 1, filename_suffix=suffix)
        self._tracker = tracker

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends `{"step": step, **metrics}`.

        Args:
          step: not smaller than in the call before.
          metrics: numbers, scalar arrays, strings or None by name; "step" is taken. Numbers go to TensorBoard, too.
            A number that is not finite is written as null.

        Raises:
          ValueError: if a value is an array of more than one element, or a metric is called "step".
          OSError: if the disk is full.
        """
        if "step" in metrics:
            raise ValueError('"step" is no name for a metric')
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        self._lines.append({"step": step, **values})
        self._tell({name: value for name, value in values.items() if isinstance(value, int | float)}, step)

    def write_times(self, step: int, values: Mapping[str, float]) -> None:
        """Appends to `performance.jsonl`, which is never cut back: an update that was done twice took its time twice."""
        self._times.append({"step": step, "time": time.time(), **values})
        self._tell({f"performance/{name}": value for name, value in values.items()}, step)

    def _tell(self, numbers: Mapping[str, int | float], step: int) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker(numbers, step)

    def flush(self) -> None:
        """Hands pending TensorBoard events to the operating system; lines never wait."""
        self._events.flush()

    def close(self) -> None:
        """Writes everything out; call once at the end."""
        self._lines.close()
        self._times.close()
        self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _scalar(name: str, value: Any) -> float | int | str | None:
    if value is None or isinstance(value, str | int | float):
        return value
    if np.size(value) != 1:
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}; reduce it to a number")
    return np.asarray(value).item()


def _plain(value: Any, name: str = "config") -> Any:
    """`value` as JSON would give it back; TypeError naming the field if it cannot."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}; a field must be a number, string, true, false, null or list")


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration that a work directory was made with.

    Raises:
      WorkdirError: its `config.json` is unreadable.
      OSError: there is none.
    """
    file = Path(path) / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkdirError(f"{file} is not valid JSON ({error}); use another work directory or repair it") from None
    if not isinstance(found, dict):
        raise WorkdirError(f"{file} holds no configuration; use another work directory")
    return found


def _compare(wanted: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    ours, theirs = dict(_leaves(wanted)), dict(_leaves(found))
    names = sorted(ours.keys() | theirs.keys())
    pairs = [(name, ours.get(name, _ABSENT), theirs.get(name, _ABSENT)) for name in names]
    lines = [f"  {name}: {_show(mine)} now, {_show(other)} there" for name, mine, other in pairs if mine != other]
    if lines:
        raise WorkdirError(
            f"{path} belongs to a run with another configuration:\n" + "\n".join(lines) + "\n"
            "Use another work directory, or the configuration of that run."
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not name):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
