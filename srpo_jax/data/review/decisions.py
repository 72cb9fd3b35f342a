"""What people can change about a record, what they decide, and what several decisions come to. Pure functions."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.builder.guards import hard_refusal, reply_problems
from srpo_jax.data.records import Record, RecordError
from srpo_jax.paths import STEP_TITLES

CONTESTED = (
    "Pornography",
    "Political Controversies",
    "Discrimination and Stereotypes",
    "Offensive Religious Beliefs",
)
"""Categories on which reasonable people differ: two decide blind to each other, a third person where they disagree."""

STEPS = tuple(f"steps.{number}" for number in range(1, len(STEP_TITLES) + 1))
EDITABLE = ("category", "question", *STEPS, "safe_reply", "unsafe_reply")
LONGEST = 1 << 20
"""Characters of one edited field."""

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, UTF-8 cannot

Edits = Mapping[str, str | None]
"""New texts of some of the fields `EDITABLE`."""


class Status(enum.StrEnum):
    """What a person decided; `DISTURBING` is a rejection for the sake of those who would see the record."""

    ACCEPTED = "accepted"
    EDITED = "edited"
    REJECTED = "rejected"
    DISTURBING = "disturbing"

    @property
    def kept(self) -> bool:
        """Whether the record stays in the data set."""
        return self in (Status.ACCEPTED, Status.EDITED)


@dataclasses.dataclass(frozen=True)
class Decision:
    """One person's decision about a record.

    Attributes:
      reviewer: their name.
      status: what they decided.
      edits: the fields that they changed; () unless `status` is EDITED.
      note: why, in their words.
      time: UTC, ISO 8601.
      images: SHA-256 of the image files that they decided about; () if the record is not kept.
      place: of the decision in the log, from 1.
      opened: whether they had opened the unsafe reply, where that is kept apart.
    """

    reviewer: str
    status: Status
    edits: Edits
    note: str
    time: str
    images: tuple[str, ...]
    place: int
    opened: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the decisions about a record come to.

    Attributes:
      decisions: those it rests on, the adjudicator's last.
      adjudicated: whether an adjudicator decided.
    """

    status: Status
    edits: Edits
    decisions: tuple[Decision, ...]
    adjudicated: bool

    @property
    def opened(self) -> bool:
        """Whether all whose decision this is had opened the unsafe reply that is kept apart."""
        return all(one.opened for one in (self.decisions[-1:] if self.adjudicated else self.decisions))


def outcome(decisions: Sequence[Decision], needed: int, ruling: Decision | None = None) -> Outcome | None:
    """The outcome of a record; None while decisions are missing or differ.

    Decisions agree if all reject, or if all keep the same text. A rejected record is disturbing if one of them found it so.

    Args:
      decisions: of the reviewers.
      needed: how many the record takes.
      ruling: the adjudicator's decision, which stands above the others'.
    """
    decisions = tuple(decisions)
    if ruling is not None:
        return Outcome(ruling.status, ruling.edits, (*decisions, ruling), adjudicated=True)
    if len(decisions) < needed:
        return None
    first = decisions[0]
    if not any(one.status.kept for one in decisions):
        status = Status.DISTURBING if any(one.status is Status.DISTURBING for one in decisions) else Status.REJECTED
        return Outcome(status, {}, decisions, adjudicated=False)
    if all(one.status.kept and one.edits == first.edits for one in decisions):
        return Outcome(first.status, first.edits, decisions, adjudicated=False)
    return None


def needed(record: Record, twin: Record | None, decisions: Sequence[Decision] = ()) -> int:
    """How many people have to decide: 2 if the record, its twin or an edit of it is in one of `CONTESTED`, else 1."""
    categories = {record.category, None if twin is None else twin.category}
    categories |= {one.edits.get("category") for one in decisions}
    return 2 if categories & set(CONTESTED) else 1


def fields(record: Record) -> dict[str, str | None]:
    """The texts of `EDITABLE`; a category of None is a harmless record."""
    steps = dict(zip(STEPS, record.steps, strict=True))
    texts = {"category": record.category, "question": record.question, **steps}
    return texts | {"safe_reply": record.safe_reply, "unsafe_reply": record.unsafe_reply}


def parse_edits(record: Record, value: Any) -> dict[str, str | None]:
    """What a page sent as edits, without white space around texts and without fields that are as they were.

    Raises:
      ValueError: it is no object of editable fields with texts.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"edits must be an object of fields, not {type(value).__name__}")
    before, edits = fields(record), {}
    for name, text in value.items():
        if name not in EDITABLE:
            raise ValueError(f"{name!r} cannot be edited; fields are {', '.join(EDITABLE)}")
        if not (text is None and name in ("category", "unsafe_reply")) and not isinstance(text, str):
            raise ValueError(f"field {name!r} must be text, not {type(text).__name__}")
        text = None if text is None else storable(name, text).strip()
        if name in ("category", "unsafe_reply"):
            text = text or None
        if text != before[name]:
            edits[name] = text
    return edits


def storable(name: str, text: str) -> str:
    """The text; a ValueError if it is too long, or cannot be written as UTF-8."""
    if len(text) > LONGEST:
        raise ValueError(f"field {name!r} has {len(text):,} characters; {LONGEST:,} at most")
    if _SURROGATE.search(text):
        raise ValueError(f"field {name!r} holds half of a character (a lone surrogate); remove it")
    return text


def revised(record: Record, edits: Edits) -> Record:
    """The record with its edits.

    Raises:
      RecordError: the result breaks the schema; faults of a step carry the name of its field, such as "steps.3".
    """
    texts: dict[str, Any] = fields(record) | dict(edits)
    if broken := [name for name, text in texts.items() if text and _SURROGATE.search(text)]:
        raise RecordError(
            record.id, [(name, "holds half of a character (a lone surrogate); remove it") for name in broken]
        )
    try:
        return dataclasses.replace(
            record,
            question=texts["question"],
            risky=texts["category"] is not None,
            category=texts["category"],
            steps=tuple(texts[name] for name in STEPS),
            safe_reply=texts["safe_reply"],
            unsafe_reply=texts["unsafe_reply"],
        )
    except RecordError as error:
        raise RecordError(record.id, [_at_step(*problem) for problem in error.problems]) from None


def guarded(record: Record, edits: Edits) -> None:
    """Holds what people write, or take from a file of its own, to the rules that agents are held to (`builder.guards`).

    Raises:
      RecordError: an edited text that they refuse, by field.
    """
    problems = [
        (name, f"guard rails refuse it: {rule}") for name, text in edits.items() if (rule := hard_refusal(text or ""))
    ]
    if reply := edits.get("unsafe_reply"):
        problems += [("unsafe_reply", problem) for problem in reply_problems(reply)]
    if problems:
        raise RecordError(record.id, problems)


def _at_step(field: str, what: str) -> tuple[str, str]:
    found = re.match(r"step (\d+) (.*)", what, re.DOTALL) if field == "steps" else None
    return (f"steps.{found[1]}", found[2]) if found else (field, what)


def digest(record: Record) -> str:
    """Names the version of a record that a decision is about: its texts, its twin, the names and sizes of its images."""
    images = [(path.name, path.stat().st_size) for path in record.images if isinstance(path, Path)]
    told = json.dumps([record.id, record.twin, images, fields(record)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
