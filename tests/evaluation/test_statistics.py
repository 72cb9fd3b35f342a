import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from srpo_jax.evaluation.statistics import both, bounds, collapse, every, rate, wilson


@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_whole_numbers_give_scipys_interval(case):
    k, n = case
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_known_values():
    low, high = wilson(0, 400)
    assert low == 0
    assert high == pytest.approx(0.0095, abs=5e-5)  # Wald would say 0
    assert wilson(400, 400)[1] == 1
    low, high = wilson(181, 4000)
    assert (low, high) == pytest.approx((0.0392, 0.0522), abs=5e-4)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_no_proportion(k, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(k, n)


def test_the_prompt_is_n():
    once = rate([[True], [False]])
    copies = rate([[True] * 8, [False] * 8])
    assert once == copies
    assert (once.n, once.rate) == (2, 0.5)
    assert rate([[True, False], [False, False]]).rate == 0.25
    assert rate([[True], []]).n == 1


def test_unknown_counts_against_the_policy_and_bounds_the_truth():
    good = rate([[True], [None], [False], [None]])
    assert (good.rate, good.best, good.unknown) == (0.25, 0.75, 0.5)
    fault = rate([[True], [None], [False], [None]], fault=True)
    assert (fault.rate, fault.best, fault.unknown) == (0.75, 0.25, 0.5)


def test_nothing_has_no_rate():
    assert rate([]).to_json() == dict.fromkeys(("rate", "low", "high", "unknown", "best")) | {"n": 0}


@given(st.lists(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=4), min_size=1, max_size=30))
def test_rate_lies_in_its_interval_and_bounds_enclose_every_completion(prompts):
    found, best = rate(prompts), rate([[x is not False for x in p] for p in prompts])
    assert 0 <= found.low <= found.rate <= found.high <= 1
    assert math.isclose(found.best, best.rate)
    assert found.rate == rate([[x is True for x in p] for p in prompts]).rate


def test_three_valued_and():
    assert both(True, True) is True
    assert both(None, False) is False
    assert both(True, None) is None
    assert every([]) is True
    assert every([None, False]) is False


OUTCOMES = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=5)


@given(OUTCOMES, st.sampled_from(["any", "all", "majority"]))
def test_a_collapsed_prompt_is_known_exactly_where_every_completion_agrees(outcomes, how):
    count = {"any": lambda x: any(x), "all": lambda x: all(x), "majority": lambda x: 2 * sum(x) > len(x)}[how]
    filled = itertools.product(*([x] if x is not None else [True, False] for x in outcomes))
    possible = {count(x) for x in filled}
    assert collapse(outcomes, how) is (possible.pop() if len(possible) == 1 else None)


def test_collapse_refuses_nothing_and_nonsense():
    with pytest.raises(ValueError, match="without samples"):
        collapse([], "any")
    with pytest.raises(ValueError, match="majority"):
        collapse([True], "most")


@given(st.lists(OUTCOMES, min_size=1, max_size=20), st.booleans())
def test_bounds_hold_the_interval_of_every_completion(prompts, fault):
    low, high = bounds(rate(prompts, fault=fault))
    for value in (True, False):
        filled = rate([[value if x is None else x for x in p] for p in prompts], fault=fault)
        assert low <= filled.low + 1e-12
        assert filled.high <= high + 1e-12


def test_nothing_has_no_bounds():
    assert bounds(rate([])) is None
