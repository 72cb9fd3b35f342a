"""Checkpoints of a run: a pytree of arrays plus JSON metadata per step. The only file that knows Orbax."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

PyTree = Any

_UNFINISHED = ".orbax-checkpoint-tmp"
# Also tells a whole checkpoint from one whose metadata file was lost: Orbax reads that as "no metadata".
_METADATA_KEY = "srpo_jax"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


class CheckpointMismatchError(ValueError):
    """A checkpoint of another model or optimizer than the one it is restored into."""


class Checkpointer:
    """Saves and restores the state of a run in numbered steps.

    A step appears in the directory by one rename after everything in it was written, so a kill or a full disk during a
    save leaves the steps before untouched. What such a save leaves behind is removed with a warning by the next
    `Checkpointer` on that directory. A step that was damaged afterwards (files missing or cut short) is set aside by
    `restore` with a warning, renamed to `damaged-STEP`, and the newest whole one is taken; flipped bits inside a file
    of the right length are not detected.

    In a job of several processes every process makes every call.

    Args:
      directory: made if missing; local, or any file system that Orbax reaches.
      keep: how many of the newest steps stay; older ones are deleted after a newer one is complete.
      read_only: changes nothing in the directory, so that steps can be read while a run is writing there: no save, nothing
        removed or set aside.

    Raises:
      ValueError: if `keep` is not positive.
      CheckpointError: if `read_only` and there is no such directory.
    """

    def __init__(self, directory: str | Path, keep: int = 2, *, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        path = epath.Path(directory)
        self.directory = (
            path if "://" in str(path) else path.absolute()
        )  # `absolute` takes an address for a relative path
        self._keep = keep
        self._read_only = read_only
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory; give the one of a run")
        self._orbax = self._open()
        self._pending: tuple[int, Any] | None = None

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Copies `state` off the device and writes it in the background; waits for the save before, if any.

        The arrays may be donated or overwritten as soon as this returns.

        Args:
          step: not negative, larger than every saved one.
          state: arrays (jax or numpy); random keys as their key data.
          metadata: JSON values: data position, configuration, anything small.

        Raises:
          TypeError: if a leaf is no array or `metadata` is not JSON.
          CheckpointError: if this save cannot start, or the one before failed (disk full, not writable), or for a reader.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} is open for reading only")
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not isinstance(leaf, jax.Array | np.ndarray):
                raise TypeError(f"state{_name(path)} is a {type(leaf).__name__}; save arrays, and JSON in metadata")
        content = json.loads(json.dumps(dict(metadata), allow_nan=False))
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(f"step {step} is not after step {latest}, which {self.directory} already holds")
        try:
            response = self._orbax.save_async(step, state, force=True, custom_metadata={_METADATA_KEY: content})
        except Exception as error:
            raise self._failed_save(step, error) from error
        self._pending = (step, response)

    def wait(self) -> None:
        """Waits until the save under way is complete.

        Raises:
          CheckpointError: if it failed; the steps before are intact.
        """
        if self._pending is None:
            return
        step, response = self._pending
        self._pending = None
        try:
            response.result()
        except Exception as error:
            raise self._failed_save(step, error) from error

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def restore(self, step: int | None, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step.

        Args:
          step: None for the newest that can be read.
          like: the structure to restore: `jax.ShapeDtypeStruct` leaves, with `sharding` for where each array shall go
            (which may differ from where it was saved), or arrays of which shape, dtype and sharding are taken. A leaf
            `...` is not read and comes back as it is.

        Returns:
          (state, metadata), state with the structure of `like`.

        Raises:
          CheckpointMismatchError: if names, shapes or dtypes differ from what was saved; every difference is named.
          CheckpointError: if there is no such step, or a step asked for by number is damaged.
        """
        self.wait()
        if step is not None:
            if step not in self.steps():
                raise CheckpointError(f"{self.directory} holds no step {step}; it holds {self.steps() or 'none'}")
            try:
                return self._read(step, like)
            except _Damaged as damage:
                raise CheckpointError(f"{self.directory / str(step)} cannot be read: {damage}") from damage
        tried: set[int] = set()
        # A writer may have replaced what a reader listed; so the list is asked again until nothing in it is new.
        while candidates := [candidate for candidate in self.steps() if candidate not in tried]:
            tried.add(candidates[-1])
            try:
                return self._read(candidates[-1], like)
            except _Damaged as damage:
                self._set_aside(candidates[-1], damage)
        raise CheckpointError(f"{self.directory} holds no checkpoint that can be read")

    def close(self) -> None:
        """Waits for the save under way and releases threads.

        Raises:
          CheckpointError: if that save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> ocp.training.Checkpointer:
        if self._read_only:
            return self._open_reader()
        names = sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []
        for name in names:
            if _UNFINISHED in name:
                logging.warning("removing %s: a save that did not finish", self.directory / name)
        return ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    def _open_reader(self) -> ocp.training.Checkpointer:
        for _ in range(99):
            # The writer deleted a step while Orbax was looking at it, or between its two looks.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return ocp.training.Checkpointer(self.directory)
        return ocp.training.Checkpointer(self.directory)

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        try:
            found = self._orbax.metadata(step)
            metadata = (found.custom_metadata or {})[_METADATA_KEY]
            if found.metadata is None:  # Orbax logs why.
                raise ValueError("the list of arrays cannot be read")
            saved = dict(_signature(found.metadata))
        except Exception as error:  # Orbax raises whatever its storage layer met.
            raise _Damaged(f"its metadata are missing or unreadable ({_brief(error)})") from error
        _compare(dict(_signature(like)), saved, f"step {step} of {self.directory}")
        try:
            return self._orbax.load(step, jax.tree.map(_abstract, like)), metadata
        except Exception as error:
            raise _Damaged(_brief(error)) from error

    def _set_aside(self, step: int, damage: Exception) -> None:
        if self._read_only:
            logging.warning("passing over %s: %s", self.directory / str(step), damage)
            self._orbax.close()
            self._orbax = self._open()  # which lists the steps anew
            return
        aside = self.directory / f"damaged-{step}"
        logging.warning("ignoring %s: %s; it is renamed to %s", self.directory / str(step), damage, aside.name)
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            (self.directory / str(step)).rename(aside)
        self._orbax.reload()

    def _failed_save(self, step: int, error: Exception) -> CheckpointError:
        # A failed Orbax checkpointer raises the same error for ever; a fresh one also removes what was written of the
        # step, which would keep a full disk full.
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = self._open()
        kept = self.latest()
        before = "no step is saved yet" if kept is None else f"step {kept} is intact"
        remedy = "the disk is full: free space and run again" if _is_full(error) else "run again once the cause is gone"
        return CheckpointError(f"saving step {step} to {self.directory} failed ({_brief(error)}); {before}; {remedy}")


class _Damaged(Exception):
    """A step whose files cannot be read."""


def _name(path: tuple[Any, ...]) -> str:
    """A key path in the notation that does not depend on the kind of container: Orbax gives back dicts and lists."""
    return "".join(f"/{getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))}" for key in path)


def _signature(tree: PyTree) -> Iterator[tuple[str, tuple[tuple[int, ...], str] | None]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), None if leaf is ... else (tuple(leaf.shape), str(np.dtype(leaf.dtype)))


def _abstract(leaf: Any) -> Any:
    if leaf is ... or isinstance(leaf, np.ndarray):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _compare(wanted: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    lines = [f"  {name}: not in the checkpoint" for name in sorted(wanted.keys() - saved.keys())]
    lines += [f"  {name}: only in the checkpoint" for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & saved.keys()):
        if wanted[name] is not None and wanted[name] != saved[name]:
            (shape, dtype), (saved_shape, saved_dtype) = wanted[name], saved[name]
            lines.append(f"  {name}: {dtype}{list(shape)} wanted, {saved_dtype}{list(saved_shape)} saved")
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise CheckpointMismatchError(
            f"{what} belongs to another model, optimizer or set of trainable parameters:\n"
            + "\n".join(lines[:20] + more)
            + "\nUse the configuration it was made with, or another work directory."
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_full(error: BaseException) -> bool:
    """Whether a full disk is at the root: an OSError in the chain, or its text in tensorstore's message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = ("No space left", "Disk quota exceeded", "File too large")
    return any(
        (isinstance(e, OSError) and e.errno in full) or any(text in str(e) for text in texts) for e in _chain(error)
    )


def _brief(error: BaseException) -> str:
    """The root cause in one line: Orbax wraps it in pages of handler lists."""
    root = list(_chain(error))[-1]
    lines = str(root).strip().splitlines() or [""]
    return f"{type(root).__name__}: {lines[0][:300]}"
