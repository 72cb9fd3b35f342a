"""Unsafe replies in a file of their own, so that a data set can be read and passed on without them.

The builder (`unsafe_replies="apart"`) and the export of a review write one; each line is {"id": of the record,
"unsafe_reply": text}, and what else its writer tells. Nothing reads it unless it is named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.records import Record, RecordError

APART = "unsafe_replies.jsonl"
"""The file's name beside records.jsonl; readable to its owner only."""


def join_apart(records: Sequence[Record], path: str | Path) -> tuple[list[Record], frozenset[str]]:
    """Records with the unsafe replies of a file of their own.

    Args:
      records: those that it belongs to, without these replies.
      path: the file.

    Returns:
      All records, in order; the ids of those whose reply comes from the file.

    Raises:
      ValueError: what is no such file, or of other records: all faults, each with line, record, field and remedy.
      OSError: it cannot be read.
    """
    whole, joined, faults = {record.id: record for record in records}, set[str](), []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            told = json.loads(line)
            record = _joined(whole, joined, told)
        except RecordError as error:
            faults.append(f"line {number}, {error}")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
        else:
            whole[record.id] = record
            joined.add(record.id)
    if faults:
        raise ValueError("\n  ".join([f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults]))
    return [whole[record.id] for record in records], frozenset(joined)


def _joined(records: dict[str, Record], before: set[str], told: Any) -> Record:
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("id"), str)
        or not isinstance(told.get("unsafe_reply"), str)
    ):
        raise ValueError("give an object with id and unsafe_reply, both text")
    record = records.get(told["id"])
    if record is None:
        raise ValueError(f"there is no record {told['id']!r}; name the file that was written with these records")
    problem = None
    if record.id in before:
        problem = "stands twice; keep one line"
    elif record.unsafe_reply is not None:
        problem = "the record has one of its own; keep one of them"
    elif not record.risky:
        problem = "the record is harmless; remove the line"
    if problem:
        raise RecordError(record.id, [("unsafe_reply", problem)])
    return dataclasses.replace(record, unsafe_reply=told["unsafe_reply"])
