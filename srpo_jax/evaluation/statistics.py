"""Rates with intervals. The prompt is the unit: several samples of a prompt are one cluster."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from scipy.stats import norm

Outcome = bool | None


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of prompts.

    Attributes:
      n: prompts.
      rate: mean over prompts of the share of their samples that count; unknown samples are counted against the policy.
        None where n = 0, like the interval.
      low: lower end of the 95 % Wilson interval of `rate`.
      high: its upper end.
      unknown: mean over prompts of the share of samples that the judge could not tell.
      best: what `rate` would be if every unknown sample spoke for the policy; `rate` and `best` bound the truth.
    """

    n: int
    rate: float | None
    low: float | None
    high: float | None
    unknown: float | None
    best: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)


def rate(prompts: Iterable[Sequence[Outcome]], *, fault: bool = False) -> Rate:
    """The rate of an event over prompts, each with the outcomes of its samples.

    Args:
      prompts: per prompt, whether the event came about in each sample; None where unknown. Prompts without samples do
        not count.
      fault: whether the event speaks against the policy, so that an unknown outcome counts as the event.
    """
    clusters = [outcomes for outcomes in prompts if len(outcomes)]
    n = len(clusters)
    if not n:
        return Rate(0, None, None, None, None, None)
    # fsum and one division: a rate of 3 in 10 is 0.3 exactly as written.
    yes = math.fsum(sum(x is True for x in c) / len(c) for c in clusters)
    open_ = math.fsum(sum(x is None for x in c) / len(c) for c in clusters)
    worst, best = (yes + open_, yes) if fault else (yes, yes + open_)
    low, high = wilson(worst, n)
    return Rate(n, worst / n, low, high, open_ / n, best / n)


def bounds(rate_: Rate) -> tuple[float, float] | None:
    """Ends that hold whatever the unknown samples are: of the interval at their worst and of the interval at their best.

    None where n = 0.
    """
    if rate_.rate is None or rate_.best is None:
        return None
    ends = [wilson(share * rate_.n, rate_.n) for share in (rate_.rate, rate_.best)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def collapse(outcomes: Sequence[Outcome], how: Literal["any", "all", "majority"]) -> Outcome:
    """One outcome of a prompt from those of its samples; None only where the unknown samples could turn it.

    Args:
      outcomes: at least one.
      how: "any" sample; "all" samples; "majority", more than half of them.

    Raises:
      ValueError: no outcomes, or an unknown `how`.
    """
    if not outcomes:
        raise ValueError("a prompt without samples has no outcome")
    yes, no = sum(x is True for x in outcomes), sum(x is False for x in outcomes)
    needed = {"any": 1, "all": len(outcomes), "majority": len(outcomes) // 2 + 1}
    if how not in needed:
        raise ValueError(f"unknown way to collapse samples {how!r}: choose one of {', '.join(needed)}")
    if yes >= needed[how]:
        return True
    return False if len(outcomes) - no < needed[how] else None


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for `successes` of `n` independent trials.

    `successes` may be a sum of shares in [0, 1], one per cluster: their variance is at most that of a proportion, so the
    interval then errs on the wide side. For whole numbers it is `scipy.stats.binomtest(k, n).proportion_ci(method="wilson")`.

    Raises:
      ValueError: n < 1, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n + 1e-9:
        raise ValueError(f"{successes} successes of {n} trials are no proportion")
    p, z = min(successes / n, 1.0), float(norm.ppf(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends at 0 and n are exact; rounding must not push them out of [0, 1].
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= n else min(1.0, centre + half)
    return low, high


def both(first: Outcome, second: Outcome) -> Outcome:
    """Three-valued "and": one False decides, otherwise an unknown leaves it open."""
    return every((first, second))


def every(outcomes: Iterable[Outcome]) -> Outcome:
    """Whether all are True; False if one is False, else None if one is unknown."""
    seen = set(outcomes)
    if False in seen:
        return False
    return None if None in seen else True
