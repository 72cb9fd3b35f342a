"""Two policies on the same prompts: differences with intervals, tests, and what a comparison of this size can see.

The prompt is n. Outcomes that hang together (samples of a prompt, twins, wordings of one request) form a cluster; clusters are
resampled and permuted whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.optimize import brentq

POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
    """Policy minus baseline, in shares (0.03 is three points).

    Attributes:
      n: clusters.
      value: difference of the means.
      low: lower end of the interval.
      high: its upper end.
      p: two-sided, of no difference.
      method: how interval and p were made.
      detectable: smallest true difference that a comparison with this scatter finds with a power of 80 % at 5 %; None
        where no prompt differs.
    """

    n: int
    value: float
    low: float
    high: float
    p: float
    method: str
    detectable: float | None


def difference(
    policy: Sequence[float],
    baseline: Sequence[float],
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The paired difference of two policies over prompts.

    One binary outcome per prompt and one prompt per cluster: Tango's score interval and McNemar's exact test. Otherwise
    (shares of several samples, or several prompts in a cluster): BCa bootstrap and sign permutation over clusters.

    Args:
      policy: per prompt the share of samples that count, in [0, 1].
      baseline: the same for the other policy, in the same order of prompts.
      clusters: per prompt the name of its cluster.
      confidence: of the interval.
      seed: of resampling; the same seed gives the same numbers.

    Raises:
      ValueError: no prompts, or lists of different length.
    """
    ours, theirs = np.asarray(policy, float), np.asarray(baseline, float)
    if not len(ours) or not len(ours) == len(theirs) == len(clusters):
        raise ValueError(f"{len(ours)} and {len(theirs)} outcomes of {len(clusters)} prompts cannot be compared")
    sums, sizes = by_cluster(ours - theirs, clusters)
    n, value = len(sums), float(sums.sum() / sizes.sum())
    if n == len(ours) and set(np.unique([ours, theirs])) <= {0.0, 1.0}:
        won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
        low, high = tango(won, lost, n, confidence)
        p, method = mcnemar(won, lost), "McNemar exact, Tango interval"
    else:
        low, high = cluster_bootstrap(sums, sizes, confidence=confidence, seed=seed)
        if low == high:  # no scatter to resample is no certainty: the width that the score interval has then
            _, width = tango(0, 0, n, confidence)
            low, high = max(-1.0, value - width), min(1.0, value + width)
        p, method = permutation(sums, seed=seed), "cluster permutation, BCa bootstrap over clusters"
    return Difference(n, value, low, high, p, method, minimum_detectable_effect(sums, sizes))


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test, from the prompts that one policy alone gets right."""
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def tango(won: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of (won - lost) / n for paired proportions (Tango 1998, Statistics in Medicine 17).

    It holds every difference that the score test does not reject, and has width even without discordant pairs.

    Raises:
      ValueError: counts that are no part of n.
    """
    if n < 1 or min(won, lost) < 0 or won + lost > n:
        raise ValueError(f"{won} won and {lost} lost of {n} prompts are no paired outcome")
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    def score(delta: float) -> float:
        """The standardised distance of the data from a true difference of `delta`; falls in delta."""
        # Probability of `lost` at its maximum likelihood given delta: the root of a quadratic.
        b = -won - lost + (2 * n - won + lost) * delta
        q = (math.sqrt(max(b * b - 8 * n * (-lost * delta * (1 - delta)), 0.0)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        gap = won - lost - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    value, edge = (won - lost) / n, 1 - 1e-12
    low = -1.0 if value <= -edge or score(-edge) < z else brentq(lambda d: score(d) - z, -edge, value, xtol=1e-12)
    high = 1.0 if value >= edge or score(edge) > -z else brentq(lambda d: score(d) + z, value, edge, xtol=1e-12)
    return low, high


def cluster_bootstrap(
    sums: np.ndarray, sizes: np.ndarray, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """BCa interval of sum(sums) / sum(sizes), clusters resampled whole.

    Args:
      sums: float[C], sum of the outcomes of each cluster.
      sizes: [C], how many there are in each.
      confidence: of the interval.
      resamples: of the bootstrap.
      seed: of the resampling.

    Returns:
      The interval; where all clusters agree there is nothing to resample, and both ends are the value itself.

    Raises:
      ValueError: no clusters.
    """
    sums, sizes = np.asarray(sums, float), np.asarray(sizes, float)
    if not len(sums):
        raise ValueError("no clusters to resample")
    value = sums.sum() / sizes.sum()
    if np.ptp(sums - value * sizes) < 1e-12:
        return float(value), float(value)

    def ratio(s, n, axis):
        return s.sum(axis) / n.sum(axis)

    options = {"n_resamples": resamples, "confidence_level": confidence, "method": "BCa", "batch": 500}
    found = stats.bootstrap((sums, sizes), ratio, paired=True, rng=np.random.default_rng(seed), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def permutation(sums: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that the policies are exchangeable within every cluster.

    Args:
      sums: float[C], difference of the policies summed over each cluster; its sign is flipped cluster by cluster.
      resamples: of the permutations; all of them are taken where there are fewer.
      seed: of the permutations.
    """
    sums = np.asarray(sums, float)
    sums = sums[np.abs(sums) > 1e-12]  # a cluster without a difference has no sign
    if len(sums) < 2:
        return 1.0  # one sign, either way as extreme

    def statistic(x, axis):
        return x.sum(axis)

    options = {
        "permutation_type": "samples",
        "n_resamples": resamples,
        "rng": np.random.default_rng(seed),
        "batch": 500,
    }
    return float(stats.permutation_test((sums,), statistic, vectorized=True, **options).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: comparing each to 5 % keeps the risk of any false discovery at 5 %."""
    order = np.argsort(p, kind="stable")
    stepped = [(len(p) - rank) * p[index] for rank, index in enumerate(order)]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(p) else []
    return adjusted.tolist()


def non_inferiority(low: float, high: float, margin: float = 0.03, *, fault: bool = False) -> str:
    """Whether a difference shows that nothing worth `margin` was lost.

    Args:
      low: lower end of the 95 % interval of policy minus baseline.
      high: its upper end.
      margin: what may be lost, as a share; 0.03 is three points.
      fault: whether more is worse, as for over-refusal.

    Returns:
      "non-inferior" (a loss of `margin` is excluded), "inferior" (a smaller loss is excluded) or "inconclusive".

    Raises:
      ValueError: the margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"a margin of non-inferiority is positive, not {margin}")
    loss_low, loss_high = (low, high) if fault else (-high, -low)
    if loss_high < margin:
        return "non-inferior"
    return "inferior" if loss_low > margin else "inconclusive"


def minimum_detectable_effect(
    sums: np.ndarray, sizes: np.ndarray, *, power: float = POWER, alpha: float = 0.05
) -> float | None:
    """The smallest true difference that data of this scatter would show with `power` at a two-sided level `alpha`.

    Normal approximation, (z_{1-alpha/2} + z_power) · standard error. None where all clusters
    agree: the scatter is unknown, not 0.

    Args:
      sums: float[C], paired differences summed over each cluster.
      sizes: [C], prompts of each cluster.
      power: share of repetitions that would find it.
      alpha: level of the test.
    """
    sums, sizes = np.asarray(sums, float), np.asarray(sizes, float)
    count = len(sums)
    residual = sums - sums.sum() / sizes.sum() * sizes
    if count < 2 or np.ptp(residual) < 1e-12:
        return None
    error = math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(sizes.sum())
    return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * error


def by_cluster(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of the clusters, in order of their names: no result depends on the order of prompts."""
    _, index = np.unique(np.asarray(clusters, str), return_inverse=True)
    return np.bincount(index, values), np.bincount(index)
