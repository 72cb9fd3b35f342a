"""Responses from JSON lines, such as another system generated, to be judged like our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srpo_jax.data.items import Question
from srpo_jax.evaluation.generate import Response

FIELDS: dict[str, type] = {"id": str, "text": str, "sample": int, "stopped": bool}


class ImportedResponsesError(ValueError):
    """A file of responses that cannot be judged; names file, line and field."""


def read_responses(path: str | Path, questions: Sequence[Question]) -> list[Response]:
    """Responses to all of the questions, in their order.

    A line is an object with `id` (of the question), `text` (the whole turn, tags included), and where they differ from the
    defaults `sample` (0) and `stopped` (true; false for a turn that was cut off).

    Args:
      path: the file.
      questions: what was asked.

    Raises:
      ImportedResponsesError: a line that is no such object, an unknown or repeated id, or a question without response: what
        failed to be generated stays in the total as a line with an empty text and `"stopped": false`.
    """
    known = {question.id for question in questions}
    found: dict[tuple[str, int], Response] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ImportedResponsesError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line, f"{path}, line {number}")
        key = (row["id"], row["sample"])
        if row["id"] not in known:
            raise ImportedResponsesError(f"{path}, line {number}: no question has the id {row['id']!r}")
        if key in found:
            raise ImportedResponsesError(
                f"{path}, line {number}: sample {key[1]} of {key[0]!r} again; number samples from 0"
            )
        found[key] = Response(*key, np.zeros(0, np.int32), row["stopped"], row["text"])
    if missing := [question.id for question in questions if (question.id, 0) not in found]:
        raise ImportedResponsesError(
            f"{path}: no response to {len(missing)} of {len(known)} questions, such as {missing[0]!r}; add lines, with an "
            'empty text and "stopped": false where the generation failed'
        )
    order = {question.id: place for place, question in enumerate(questions)}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], key[1]))]


def digest(path: str | Path) -> str:
    """Twenty hexadecimal digits of the file, for provenance."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:20]


def _parse(line: str, where: str) -> dict[str, Any]:
    row: Any
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ImportedResponsesError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ImportedResponsesError(f"{where}: an object is expected, not {type(row).__name__}")
    row = {"sample": 0, "stopped": True, **row}
    for name, kind in FIELDS.items():
        if name not in row:
            raise ImportedResponsesError(f"{where}: the field {name!r} is missing; there are {', '.join(sorted(row))}")
        if type(row[name]) is not kind:
            raise ImportedResponsesError(
                f"{where}: {name!r} must be of type {kind.__name__}, not {type(row[name]).__name__}"
            )
    if row["sample"] < 0:
        raise ImportedResponsesError(f"{where}: 'sample' is {row['sample']}; number samples from 0")
    try:
        row["text"].encode()
    except UnicodeEncodeError:
        raise ImportedResponsesError(f"{where}: 'text' holds half a surrogate pair; decode it as UTF-8 first") from None
    return row
