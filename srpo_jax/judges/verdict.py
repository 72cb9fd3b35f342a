"""What a judge says about an answer, a step, or two answers side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from srpo_jax.data.records import Record
from srpo_jax.paths import ParsedPath


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's verdict on an answer.

    Attributes:
      safe: whether following the answer does no harm; None if unknown. Unknown is never counted as safe.
      effective: whether the answer serves the user: on a risky record it declines and redirects to something that fits
        the picture, on a harmless one it helps with the request; None if unknown.
      reason: one line, for people.
      refused: whether the answer declines the request without granting it; None if unknown. On a harmless record this
        is over-refusal.
      failed: whether no verdict came about (the judge declined, was filtered, timed out, or wrote what cannot be read). Such
        a verdict tells nothing, is asked again by the next run, and counts towards the failures that stop an evaluation.

    Raises:
      ValueError: a failed verdict that tells something.
    """

    safe: bool | None
    effective: bool | None
    reason: str
    refused: bool | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        if self.failed and (self.safe, self.effective, self.refused) != (None, None, None):
            raise ValueError(f"a failed verdict tells nothing, but this one does: {self}")


@dataclasses.dataclass(frozen=True)
class StepVerdict:
    """A judge's verdict on one step of a path.

    Attributes:
      number: the step's place in the path, from 1.
      safe: whether the step endorses no hazard; None if unknown.
      effective: whether its facts fit the record and, from step 3 on, a present risk is named; None if unknown.
      reason: one line, for people.
      failed: as in `Verdict`.
    """

    number: int
    safe: bool | None
    effective: bool | None
    reason: str
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class AnswerPair:
    """Two answers to one request, in the order in which a judge reads them.

    Attributes:
      aspect: what they are compared in, one of `ASPECTS`. Harmlessness and helpfulness are asked about apart, as in
        PKU-SafeRLHF (Ji et al. 2024, arXiv 2406.15513), because one question for both lets either outweigh the other.
      first: the answer read first.
      second: the other one.

    Raises:
      ValueError: another aspect, or an answer without text.
    """

    aspect: str
    first: str
    second: str

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS:
            raise ValueError(f"aspect={self.aspect!r}: use one of {', '.join(ASPECTS)}")
        if not (self.first and self.second):
            raise ValueError("an answer without text cannot be compared")


@dataclasses.dataclass(frozen=True)
class Preference:
    """Which of two answers a judge prefers, in one order of them.

    Attributes:
      better: one of `CHOICES`: "first", "second" or "tie"; None exactly where no preference came about.
      reason: one line, for people.
      failed: as in `Verdict`.

    Raises:
      ValueError: another choice, or one that failed and yet was made.
    """

    better: str | None
    reason: str
    failed: bool = False

    def __post_init__(self) -> None:
        if self.failed != (self.better is None) or self.better not in (*CHOICES, None):
            raise ValueError(f"a preference is {', '.join(CHOICES)}, or None if it failed, but this is {self}")


ASPECTS = ("safety", "helpfulness")
CHOICES = ("first", "second", "tie")

Judge = Callable[[Record, ParsedPath], Verdict]
"""Judges a parsed answer to a record; an answer without status ok gets an unknown verdict."""

PairwiseJudge = Callable[[Any, AnswerPair], Preference]
"""Compares two answers to a question (`data.items.Question`); it is asked in both orders."""
