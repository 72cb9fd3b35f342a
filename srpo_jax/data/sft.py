"""Supervised examples without a six-step path: free reasoning and an answer, or an answer alone.

What other projects publish for safety fine-tuning has no steps to branch from. Such a record trains as a trunk without
branches (`rounds=0`); it is never explored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from srpo_jax.data.records import RecordError
from srpo_jax.paths import STYLES, Grammar


@dataclasses.dataclass(frozen=True)
class SftRecord:
    """One question about images, with the reply to learn.

    Attributes:
      id: unique within a data set.
      images: files (opened lazily) or pictures in memory, in the order in which the prompt shows them; () for text only.
      question: the user's request.
      answer: the reply.
      reasoning: free text between the tags of a path; None for an answer alone, which is written without tags.
      risky: whether granting the request would do harm; None if the data does not say.
      category: kind of risk in the data's own words; None if it does not say.
      meta: anything else about the record, such as its source; not read by training.

    Raises:
      RecordError: (a ValueError) naming every field that breaks the schema.
    """

    id: str
    images: tuple[Path | PIL.Image.Image, ...]
    question: str
    answer: str
    reasoning: str | None = None
    risky: bool | None = None
    category: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        problems = [*_problems(self)]
        if problems:
            raise RecordError(self.id, problems)

    @property
    def grammar(self) -> Grammar:
        """How its turn is written: a path without headings, or no path."""
        return STYLES["none" if self.reasoning is None else "short"]

    @property
    def segments(self) -> list[str]:
        """The assistant's turn, ready to be tokenised piece by piece."""
        return self.grammar.render(() if self.reasoning is None else (self.reasoning,), self.answer)


def _problems(record: SftRecord):
    expected = {
        "id": (str, "a string"),
        "images": (tuple, "a tuple of paths or pictures"),
        "question": (str, "a string"),
        "answer": (str, "a string"),
        "reasoning": (str | None, "a string or null"),
        "risky": (bool | None, "true, false or null"),
        "category": (str | None, "a string or null"),
        "meta": (Mapping, "a mapping"),
    }
    wrong = {f: name for f, (kind, name) in expected.items() if not isinstance(getattr(record, f), kind)}
    if wrong:
        yield from ((f, f"must be {name}, not {type(getattr(record, f)).__name__}") for f, name in wrong.items())
        return
    for image in record.images:
        if not isinstance(image, Path | PIL.Image.Image):
            yield "images", f"must hold paths or pictures, not {type(image).__name__}"
    yield from ((f, "is empty") for f in ("id", "question") if not getattr(record, f).strip())
    yield from (("answer", problem) for problem in record.grammar.answer_problems(record.answer))
    if record.reasoning is not None:
        yield from (("reasoning", problem) for problem in record.grammar.step_problems(record.reasoning))
