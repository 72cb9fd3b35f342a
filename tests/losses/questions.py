"""Random questions for losses: plain lists for a reading of the formula, padded arrays for the function."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from srpo_jax import losses
from srpo_jax.trees import FAVOURABLE, UNFAVOURABLE, select_pairs

M, L, PREFIXES = 7, 5, 3


@dataclasses.dataclass
class One:
    """A branch as its formula sees it."""

    prefix: int
    verdict: int
    count: int
    step: int
    logprobs: np.ndarray
    reference: np.ndarray
    sampled: np.ndarray


@st.composite
def branch_lists(draw, least: int = 0) -> list[One]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(least, M))):
        n = draw(st.integers(1, L))
        near = -rng.exponential(size=n)
        made.append(
            One(
                draw(st.integers(0, PREFIXES - 1)),
                draw(st.sampled_from([FAVOURABLE, UNFAVOURABLE])),
                draw(st.integers(1, 3)),
                draw(st.integers(1, n)),
                near,
                near + rng.normal(scale=0.5, size=n),
                near + rng.normal(scale=0.3, size=n),
            )
        )
    return made


def as_arrays(branches: list[One]) -> losses.BranchLogprobs:
    """One question; NaN beyond the lengths, because padding must not leak."""
    tokens = {name: np.full((M, L), np.nan) for name in ("logprobs", "reference", "sampled")}
    whole = {name: np.zeros(M, int) for name in ("lengths", "counts", "step_lengths")}
    prefixes, verdicts = np.full(M, -1), np.full(M, -1)
    for m, b in enumerate(branches):
        for name in tokens:
            tokens[name][m, : len(b.logprobs)] = getattr(b, name)
        prefixes[m], verdicts[m] = b.prefix, b.verdict
        whole["lengths"][m], whole["counts"][m], whole["step_lengths"][m] = len(b.logprobs), b.count, b.step
    pairs = select_pairs(prefixes, verdicts)
    arrays = tokens | whole | {"prefixes": prefixes, "verdicts": verdicts, "pairs": pairs}
    return losses.BranchLogprobs(**{name: jnp.asarray(x)[None] for name, x in arrays.items()})


def plain_pairs(branches: list[One], value) -> float:
    """Mean over prefixes with pairs of the mean over their pairs of `value(b+, b-)`; 0 without pairs."""
    means = []
    for i in range(PREFIXES):
        here = [b for b in branches if b.prefix == i]
        found = [value(a, b) for a in here if a.verdict == FAVOURABLE for b in here if b.verdict == UNFAVOURABLE]
        if found:
            means.append(np.mean(found))
    return float(np.mean(means)) if means else 0.0
