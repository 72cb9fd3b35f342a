"""Differences of two policies: intervals cover, tests keep their level, and both are those of the literature."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from srpo_jax.evaluation.paired import (
    cluster_bootstrap,
    difference,
    holm,
    mcnemar,
    minimum_detectable_effect,
    non_inferiority,
    permutation,
    tango,
)

COUNTS = st.integers(1, 80).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, n - w), st.just(n)))
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(won, lost):
    expected = statsmodels_mcnemar([[5, won], [lost, 5]], exact=True).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=15, deadline=None)  # statsmodels collects garbage in every call
@given(st.lists(st.integers(0, 1000).map(lambda x: x / 1000), min_size=1, max_size=8))
def test_holm_is_statsmodels(p):
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


def test_holm_of_nothing_and_by_hand():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_tango_against_a_printed_example_and_at_the_edges():
    # Fagerland, Lydersen and Laake (2014): airway reactivity of 21 children, one and seven discordant.
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=1e-3)
    low, high = tango(0, 0, 50)  # Wald gives no width; the score test's limit is z² / (n + z²)
    limit = 1.959964**2 / (50 + 1.959964**2)
    assert (low, high) == pytest.approx((-limit, limit), abs=1e-6)
    assert tango(50, 0, 50)[1] == 1.0
    assert tango(0, 50, 50)[0] == -1.0
    with pytest.raises(ValueError, match="no paired outcome"):
        tango(3, 3, 5)


@settings(max_examples=40, deadline=None)
@given(COUNTS)
def test_tango_inverts_the_score_test(case):
    """At an end inside (-1, 1) the score statistic, its nuisance parameter maximised numerically, is at the quantile."""
    won, lost, n = case
    low, high = tango(won, lost, n)
    assert -1 <= low <= (won - lost) / n + 1e-9
    assert (won - lost) / n - 1e-9 <= high <= 1
    for end in (low, high):
        if abs(end) > 0.999 or abs(end) < 1e-6:
            continue

        def minus_loglik(q, delta=end):
            cells = ((won, q + delta), (lost, q), (n - won - lost, 1 - 2 * q - delta))
            return -sum(k * math.log(p) if p > 0 else -1e9 for k, p in cells if k)

        box = (max(0.0, -end), (1 - end) / 2)
        q = optimize.minimize_scalar(minus_loglik, bounds=box, method="bounded", options={"xatol": 1e-12}).x
        score = (won - lost - n * end) / math.sqrt(n * (2 * q + end - end * end))
        assert abs(score) == pytest.approx(1.959964, abs=5e-3)


@given(COUNTS)
def test_tango_mirrors(case):
    won, lost, n = case
    low, high = tango(won, lost, n)
    assert tango(lost, won, n) == pytest.approx((-high, -low), abs=1e-8)


def test_tango_covers():
    rng, hits, runs, true = np.random.default_rng(0), 0, 600, 0.15
    for won, lost, _ in rng.multinomial(40, [0.2, 0.05, 0.75], size=runs):
        low, high = tango(int(won), int(lost), 40)
        hits += low <= true <= high
    assert 0.93 <= hits / runs <= 0.975


def clustered(rng, count, effect):
    """Differences of clusters of 2 to 4 prompts that hang together: sums and sizes."""
    sizes = rng.integers(2, 5, count)
    return sizes * (effect + rng.normal(scale=0.3, size=count)) + rng.normal(scale=0.3, size=count), sizes


def test_the_cluster_bootstrap_covers_where_rows_would_not():
    rng, hits, naive, runs = np.random.default_rng(1), 0, 0, 200
    for run in range(runs):
        sums, sizes = clustered(rng, 60, 0.1)
        low, high = cluster_bootstrap(sums, sizes, resamples=800, seed=run)
        hits += low <= 0.1 <= high
        rows = np.repeat(sums / sizes, sizes)
        naive += abs(rows.mean() - 0.1) <= 1.96 * rows.std(ddof=1) / math.sqrt(len(rows))
    assert hits / runs >= 0.9
    assert naive / runs < 0.85


def test_without_scatter_there_is_nothing_to_resample():
    assert cluster_bootstrap(np.array([1.0, 2.0]), np.array([2, 4])) == (0.5, 0.5)
    assert minimum_detectable_effect(np.array([1.0, 2.0]), np.array([2, 4])) is None
    with pytest.raises(ValueError, match="no clusters"):
        cluster_bootstrap(np.zeros(0), np.zeros(0))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_permutation_is_the_enumeration(sums):
    flips = [abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in
             itertools.product((1, -1), repeat=len(sums))]  # fmt: skip
    expected = sum(flip >= abs(sum(sums)) for flip in flips) / len(flips)
    assert permutation(np.array(sums)) == pytest.approx(expected)


def test_permutation_keeps_its_level():
    rng, runs = np.random.default_rng(2), 200
    found = [permutation(clustered(rng, 40, 0.0)[0], resamples=399, seed=i) for i in range(runs)]
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.09


def test_detectable_effects_are_found_as_often_as_promised():
    rng, n = np.random.default_rng(3), 400
    sample = rng.choice([1.0, -1.0, 0.0], p=[0.1, 0.1, 0.8], size=n)
    effect = minimum_detectable_effect(sample, np.ones(n))
    draws = rng.multinomial(n, [0.1 + effect / 2, 0.1 - effect / 2, 0.8], size=400)
    power = np.mean([mcnemar(int(won), int(lost)) <= 0.05 for won, lost, _ in draws])
    assert 0.72 <= power <= 0.87


def test_one_binary_per_prompt_is_mcnemar_and_all_else_is_clusters():
    ours, theirs, names = [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0], list("abcdef")
    alone = difference(ours, theirs, names)
    assert (alone.n, alone.p) == (6, mcnemar(4, 1))
    assert (alone.low, alone.high) == tango(4, 1, 6)
    assert alone.method.startswith("McNemar")
    twins = difference(ours, theirs, list("aabbcc"))
    assert twins.n == 3
    assert twins.value == pytest.approx(alone.value)
    assert "cluster" in twins.method
    shares = difference([0.5, *ours[1:]], theirs, names)
    assert "cluster" in shares.method
    shuffled = [3, 1, 5, 0, 2, 4]
    again = difference(*([x[i] for i in shuffled] for x in (ours, theirs, list("aabbcc"))))
    assert again == twins
    with pytest.raises(ValueError, match="cannot be compared"):
        difference([1], [1, 0], ["a"])


def test_agreement_of_all_clusters_is_not_certainty():
    limit = 1.959964**2 / (20 + 1.959964**2)
    same = difference([0.5] * 20, [0.25] * 20, [str(i) for i in range(20)])
    assert (same.low, same.high) == pytest.approx((0.25 - limit, 0.25 + limit), abs=1e-6)
    assert same.detectable is None
    one = difference([1, 0.5], [0, 0], ["a", "a"])
    assert (one.low, one.high, one.p) == (pytest.approx(0.75 - 1.959964**2 / (1 + 1.959964**2), abs=1e-6), 1.0, 1.0)


def test_non_inferiority_by_its_margin():
    assert non_inferiority(-0.02, 0.10) == "non-inferior"
    assert non_inferiority(-0.04, 0.10) == "inconclusive"
    assert non_inferiority(-0.20, -0.04) == "inferior"
    assert non_inferiority(-0.10, 0.02, fault=True) == "non-inferior"
    assert non_inferiority(0.04, 0.20, fault=True) == "inferior"
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(0, 1, 0.0)


def test_the_level_of_non_inferiority():
    """A loss of exactly the margin is called non-inferior in at most about 2.5 % of the trials."""
    rng, runs = np.random.default_rng(4), 1000
    draws = rng.multinomial(300, [0.05, 0.08, 0.87], size=runs)
    called = [non_inferiority(*tango(int(w), int(lost), 300)) == "non-inferior" for w, lost, _ in draws]
    assert np.mean(called) <= stats.binom(runs, 0.025).ppf(0.999) / runs
