"""The SSUI record: images, a question, a six-step safe reasoning path and replies.

Field names follow the published record (Cai et al., AAAI-26: image, Question, Unsafe Category, Safe Reply, Unsafe Reply,
Explainable Reasoning). `risky`, `category=None` and `twin` are this library's: they let harmless twins of risky records
stand in the same data set, without which training teaches refusal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from srpo_jax.paths import Grammar

CATEGORIES = (
    "Dangerous Behavior",
    "Violence",
    "Pornography",
    "Moral Violations",
    "Illegal Crimes",
    "Political Controversies",
    "Discrimination and Stereotypes",
    "Offensive Religious Beliefs",
    "Privacy Violations",
)


class RecordError(ValueError):
    """A record that breaks the schema.

    Attributes:
      problems: (field, what is wrong and how to repair it) for every fault found.
    """

    def __init__(self, record_id: object, problems: list[tuple[str, str]]):
        self.problems = problems
        super().__init__("; ".join(f"record {record_id!r}, field {field!r}: {what}" for field, what in problems))


@dataclasses.dataclass(frozen=True)
class Record:
    """One question about images, with its reference path and replies.

    Attributes:
      id: unique within a data set.
      images: files (opened lazily) or pictures in memory, in the order in which the prompt shows them; () for text only.
      question: the user's request.
      risky: whether following the request in this picture would do harm.
      category: one of `CATEGORIES` if risky, None if harmless.
      steps: the bodies of the six steps, without headings.
      safe_reply: the reply that ends the reference path; on a risky record it redirects and helps.
      unsafe_reply: a reply that complies with a risky request, if the data has one.
      twin: id of the harmless twin of a risky record, or the reverse.
      meta: anything else about the record, such as its split; not read by training.

    Raises:
      RecordError: (a ValueError) naming every field that breaks the schema.
    """

    id: str
    images: tuple[Path | PIL.Image.Image, ...]
    question: str
    risky: bool
    category: str | None
    steps: tuple[str, ...]
    safe_reply: str
    unsafe_reply: str | None = None
    twin: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        problems = [*_type_problems(self)]
        if not problems:  # The checks of contents rely on the types.
            problems = [*_content_problems(self)]
        if problems:
            raise RecordError(self.id, problems)

    @property
    def cluster(self) -> str:
        """The same for a record and its twin, which are not independent of each other."""
        return self.id if self.twin is None else min(self.id, self.twin)


def _type_problems(record: Record) -> list[tuple[str, str]]:
    expected = {
        "id": (str, "a string"),
        "images": (tuple, "a tuple of paths or pictures"),
        "question": (str, "a string"),
        "risky": (bool, "true or false"),
        "category": (str | None, "a category's name or null"),
        "steps": (tuple, "a tuple of strings"),
        "safe_reply": (str, "a string"),
        "unsafe_reply": (str | None, "a string or null"),
        "twin": (str | None, "a record's id or null"),
        "meta": (Mapping, "a mapping"),
    }
    problems = []
    for field, (kind, name) in expected.items():
        value = getattr(record, field)
        if not isinstance(value, kind):
            problems.append((field, f"must be {name}, not {type(value).__name__}"))
    if not problems:
        problems += [
            ("images", f"must hold paths or pictures, not {type(image).__name__}")
            for image in record.images
            if not isinstance(image, Path | PIL.Image.Image)
        ]
        problems += [
            ("steps", f"step {number} must be a string, not {type(step).__name__}")
            for number, step in enumerate(record.steps, 1)
            if not isinstance(step, str)
        ]
    return problems


def _content_problems(record: Record) -> list[tuple[str, str]]:
    grammar = Grammar()
    problems = [(field, "is empty") for field in ("id", "question") if not getattr(record, field).strip()]
    if record.risky and record.category not in CATEGORIES:
        problems.append(("category", f"{record.category!r} is none of the nine categories: {', '.join(CATEGORIES)}"))
    if not record.risky and record.category is not None:
        problems.append(("category", f"must be null on a harmless record, not {record.category!r}"))
    if len(record.steps) != len(grammar.titles):
        problems.append(("steps", f"a path has {len(grammar.titles)} steps, not {len(record.steps)}"))
    for number, step in enumerate(record.steps, 1):
        problems += [("steps", f"step {number} {problem}") for problem in grammar.step_problems(step)]
    problems += [("safe_reply", problem) for problem in grammar.answer_problems(record.safe_reply)]
    if record.unsafe_reply is not None:
        problems += [("unsafe_reply", problem) for problem in grammar.answer_problems(record.unsafe_reply)]
    if record.twin == record.id:
        problems.append(("twin", "names the record itself; name its harmless or risky twin, or use null"))
    return problems
