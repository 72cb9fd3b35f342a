"""Files that survive a kill at any moment: atomic JSON, JSON lines that can be repaired and cut back, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from absl import logging

from srpo_jax import distributed

LOCK_FILE = ".lock"

_held: dict[Path, int] = {}


class LockedError(RuntimeError):
    """Another process works there."""


def lock_folder(folder: str | Path, *, shared: bool = False) -> None:
    """Takes a folder for this process until it ends, however it ends; again in the same process it does nothing.

    Only those who lock it are kept out: reading needs no lock. On a file system without locks it warns and goes on.

    Args:
      folder: must exist.
      shared: let in others who share it, too.

    Raises:
      LockedError: another process has it; names the process and its machine.
      OSError: the folder does not exist or is not writable.
    """
    path = Path(folder).resolve() / LOCK_FILE
    held = _held.get(path)
    if held is not None and path.exists() and os.path.samestat(os.fstat(held), path.stat()):
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not _lock(file, path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
        owner = os.read(file, 100).decode(errors="replace").strip()
        os.close(file)
        raise LockedError(
            f"{folder} is in use by another process ({owner or 'unknown'}); wait for it, end it, or choose another folder"
        )
    os.ftruncate(file, 0)
    os.pwrite(file, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    _held[path] = file


@contextlib.contextmanager
def claim(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a piece of work that several processes could do, until the block ends or this process is killed.

    Args:
      path: a file that stands for the work; made with its folder where missing, and left there.
      wait: until whoever has it lets go.

    Yields:
      Whether it is held; False if another has it. Always true on a file system without locks, after a warning.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield _lock(file, path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(file)


def _lock(file: int, path: Path, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Locks an open file until it is closed; False if somebody else has. The kernel lets go of it after a kill, too."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning("%s cannot be locked (%s): let one process at a time write there", path, error)
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON so that a reader sees the old file or the whole new one, never a part.

    Args:
      path: the file; its folder must exist. One writer at a time.
      value: anything JSON knows; NaN and infinities become null, because JSON has no name for them.

    Raises:
      TypeError: if `value` holds something JSON does not know.
      OSError: if the disk is full or not writable; the old file is intact.
    """
    path = Path(path)
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _explained(error, path) from error
    os.replace(partial, path)
    _sync_folder(path.parent)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file that `JsonLines` wrote; a half-written last line is passed over.

    Raises:
      ValueError: if another line is not a JSON object, naming file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield _parse_line(line, path, number)


class JsonLines:
    """Appends JSON objects to a file, one per line; each is whole or absent after a kill.

    Opening the file removes a half-written last line. Use as a context manager, or call `close`.

    Args:
      path: the file, created if missing; its folder must exist.

    Raises:
      LockedError: somebody else is writing it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if not _lock(self._file, self.path):
            os.close(self._file)
            raise LockedError(f"{self.path} is being written by another process; wait for it, or choose another folder")
        self._truncate(_whole_lines_size(self._file))

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it survives a kill of this process as soon as the call returns.

        Raises:
          TypeError: if the record holds something JSON does not know.
          OSError: if the disk is full or not writable; the file then ends with the record before.
        """
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            self._truncate(size)
            raise _explained(error, self.path) from error

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Removes the first record for which `keep` is false and everything after it.

        Returns:
          How many records stay.

        Raises:
          ValueError: if a line among those to keep is not a JSON object.
        """
        kept, size = 0, 0
        with open(self.path, "rb") as file:
            for line in file:
                if not keep(_parse_line(line, self.path, kept + 1)):
                    break
                kept += 1
                size += len(line)
        self._truncate(size)
        return kept

    def sync(self) -> None:
        """Waits until everything is on the disk, or on the server of a network file system."""
        os.fsync(self._file)

    def close(self) -> None:
        """Flushes to the disk and closes; further calls do nothing."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Store:
    """Append-only JSON lines of a job, and what they held when they were opened; without a folder, nothing at all.

    Every process of a job appends to a file of its own: `name.jsonl`, `name-1.jsonl`, ... What was written is read from all of
    them, whatever number of processes wrote it.

    Attributes:
      lines: the records that were there when it was opened or last shared, file by file in order.
    """

    def __init__(self, path: Path | None, file: JsonLines | None, lines: list[dict[str, Any]]):
        self._path, self._file, self.lines = path, file, lines

    @staticmethod
    def open(folder: str | Path | None, name: str) -> Store:
        """The files of `name` in `folder`, made where missing; one that keeps nothing if `folder` is None.

        Raises:
          ValueError: no folder in a job of several processes, which have no other way to share what they find.
        """
        if folder is None:
            if distributed.process_count() > 1:
                raise ValueError(f"{name}: several processes share what they find in a folder; name one")
            return Store(None, None, [])
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        index = distributed.process_index()
        file = JsonLines(path.with_name(f"{path.stem}-{index}{path.suffix}") if index else path)
        return Store(path, file, read_family(path))

    def append(self, line: dict[str, Any]) -> None:
        """Appends one record; see `JsonLines.append`."""
        if self._file is not None:
            self._file.append(line)

    def sync(self) -> None:
        """Waits until what was appended is on the disk; see `JsonLines.sync`."""
        if self._file is not None:
            self._file.sync()

    def share(self) -> list[dict[str, Any]]:
        """Waits until every process is done with appending and reads what all have written."""
        self.sync()  # network file systems show other hosts what was written out
        distributed.barrier()
        if self._path is not None:
            self.lines = read_family(self._path)
        return self.lines

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def read_family(path: str | Path) -> list[dict[str, Any]]:
    """The records of `name.jsonl` and of its companions `name-1.jsonl`, `name-2.jsonl`, ... that other processes wrote."""
    path = Path(path)
    numbered = [
        (int(p.stem.removeprefix(f"{path.stem}-")), p) for p in path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}")
    ]
    files = [path] * path.exists() + [p for _, p in sorted(numbered)]
    return [line for file in files for line in read_jsonl(file)]


def _whole_lines_size(file: int) -> int:
    """Bytes up to and including the last line end, found from the back: the file may be large."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - (1 << 16))
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _parse_line(line: bytes, path: str | Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error}); restore the file or remove it") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: a JSON object is expected, not {type(record).__name__}")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = f"no room left to write; free disk space and run again ({error.strerror})"
        return OSError(error.errno, message, str(path))
    return error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
