"""Checkpoint folders behind an address such as gs://bucket/model, through etils.epath (gcsfs for gs://).

Weights are read by ranges, each process what its devices hold, and written a file at a time: no machine needs room for all.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

_LONGEST_HEADER = 100_000_000  # as the safetensors library has it


def is_address(path: str | Path | epath.Path) -> bool:
    """Whether `path` is an address rather than a path on this machine."""
    return "://" in str(path)


class Tensor:
    """A tensor of a safetensors file that is read by ranges: whole rows of its first axis, no more.

    Args:
      file: where it is.
      kind: its dtype's name in the file.
      dtype: of its values.
      shape: of the tensor.
      start: its first byte.
    """

    def __init__(self, file: epath.Path, kind: str, dtype: Any, shape: tuple[int, ...], start: int):
        self._file, self._kind, self._dtype, self._shape, self._start = file, kind, np.dtype(dtype), shape, start

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._kind

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """The values at slices without steps."""
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = range(self._shape[0])[first]
        size = math.prod(self._shape[1:]) * self._dtype.itemsize
        with self._file.open("rb") as file:
            file.seek(self._start + rows.start * size)
            data = file.read(len(rows) * size)
        if len(data) != len(rows) * size:
            raise ValueError(f"{self._file}: is shorter than its header says; fetch it again")
        return np.frombuffer(data, self._dtype).reshape(len(rows), *self._shape[1:])[(slice(None), *others)]


def open_tensors(file: epath.Path, dtypes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; those of a dtype that is not in `dtypes` can be looked at, not read.

    Raises:
      ValueError: no safetensors file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(length, _LONGEST_HEADER)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {
            name: Tensor(
                file, e["dtype"], dtypes.get(e["dtype"], "u1"), tuple(e["shape"]), 8 + length + e["data_offsets"][0]
            )
            for name, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


@contextmanager
def on_this_machine(folder: str | Path) -> Iterator[Path]:
    """The folder, or what stands in for an address: its files but the model's weights, in a folder that lasts this long.

    Raises:
      FileNotFoundError: no such folder.
    """
    if not is_address(folder):
        yield Path(folder)
        return
    there = epath.Path(folder)
    if not there.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with tempfile.TemporaryDirectory() as here:
        for file in there.iterdir():
            if not (file.name.startswith("model") and file.suffix == ".safetensors") and not file.is_dir():
                (Path(here) / file.name).write_bytes(file.read_bytes())
        yield Path(here)


class Draft:
    """A new folder that is being written at `path`, on this machine."""

    def __init__(self, path: Path, address: epath.Path | None = None):
        self.path, self._address = path, address

    def done(self, name: str) -> None:
        """Says that a file is written: it need not be kept here until the end."""
        if self._address is not None:
            self._address.mkdir(parents=True, exist_ok=True)
            with open(self.path / name, "rb") as here, (self._address / name).open("wb") as there:
                shutil.copyfileobj(here, there, 1 << 24)
            (self.path / name).unlink()


@contextmanager
def new_folder(folder: str | Path, last: str) -> Iterator[Draft]:
    """A folder that becomes `folder`, which must not exist or be empty, when all went well.

    On this machine it appears by one rename. At an address, which knows none, the file `last` comes last: without it, nothing
    takes the folder for a checkpoint.

    Raises:
      FileExistsError: the folder has content.
    """
    at = epath.Path(folder)
    if at.is_file() or (at.is_dir() and any(at.iterdir())):
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")
    if is_address(folder):
        with tempfile.TemporaryDirectory() as here:
            draft = Draft(Path(here), at)
            try:
                yield draft
                for file in sorted(Path(here).iterdir(), key=lambda file: file.name == last):
                    draft.done(file.name)
            except BaseException:
                if at.exists():
                    at.rmtree()
                raise
        return
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield Draft(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
