"""What is asked in an evaluation: records, and items of published benchmarks, which have no reference path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import PIL.Image


class Question(Protocol):
    """What generation, judges and metrics read of a question, be it a `Record` or an `Item`."""

    @property
    def id(self) -> str:
        """Unique within an evaluation."""

    @property
    def images(self) -> tuple[Path | PIL.Image.Image, ...]:
        """In the order in which the prompt shows them; () for text only."""

    @property
    def question(self) -> str:
        """The user's request."""

    @property
    def risky(self) -> bool:
        """Whether granting the request in this picture would do harm."""

    @property
    def category(self) -> str | None:
        """Kind of risk, in the data's own words."""

    @property
    def cluster(self) -> str:
        """Questions that are not independent of each other (twins, pairs, one text on two pictures) share it."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Anything else, such as what a judge's prompt quotes; "split" names the subset that is reported apart."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A benchmark's question; the fields are those of `Question`."""

    id: str
    images: tuple[Path | PIL.Image.Image, ...]
    question: str
    risky: bool
    category: str | None
    cluster: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def subset(self) -> str:
        """The part of the benchmark that it belongs to."""
        return self.meta["split"]
