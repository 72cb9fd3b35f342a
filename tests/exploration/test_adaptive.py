"""Promises: samples go where verdicts disagree, nothing exceeds its limit, and the result is a part of uniform exploration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax.exploration.adaptive import (
    AdaptiveConfig,
    carry_over,
    explore_waves,
    generated_tokens,
    replay,
    wanted,
)
from srpo_jax.inputs import Encoded
from srpo_jax.trees import Branch, ReasoningTree, Trunk

S = 3
ENCODED = Encoded(np.arange(9, dtype=np.int32), np.zeros((3, 9), np.int32), np.full(9, -1, np.int32), None)
TRUNK = Trunk("r", ENCODED, (2, 4, 6, 8))


def branch(prefix, number, verdict):
    return Branch(prefix, np.asarray([prefix, number], np.int32), np.zeros(2, np.float32), "ok", verdict)


@st.composite
def configs(draw):
    first = draw(st.integers(1, 4))
    return AdaptiveConfig(first, draw(st.integers(first, 9)), draw(st.integers(1, 3)), draw(st.integers(0, 2)))


@st.composite
def uniform_trees(draw, k=9):
    verdicts = [[draw(st.sampled_from([True, True, False, None])) for _ in range(k)] for _ in range(S)]
    return ReasoningTree(TRUNK, tuple(branch(i, j, v) for i in range(S) for j, v in enumerate(verdicts[i])))


def by_prefix(tree):
    return {i: [b for b in tree.branches if b.prefix == i] for i in tree.trunk.prefixes}


@settings(deadline=None)
@given(uniform_trees(), configs())
def test_what_is_sampled_is_the_beginning_of_uniform_exploration_and_ends_for_a_reason(tree, config):
    found, whole = by_prefix(replay(tree, config)), by_prefix(tree)
    for prefix, here in found.items():
        assert all(a is b for a, b in zip(here, whole[prefix][: len(here)], strict=True))
        assert config.first <= len(here) <= config.most
        assert len(here) == config.most or len({b.verdict for b in here} - {None}) == 1
        for n in range(config.first, len(here), config.wave):  # each wave had a reason
            assert len({b.verdict for b in here[:n]} - {None}) != 1


def test_disagreement_costs_and_agreement_saves():
    config = AdaptiveConfig(first=2, most=8)
    split = ReasoningTree(TRUNK, tuple(branch(i, j, j % 2 == 0) for i in range(S) for j in range(8)))
    agreed = ReasoningTree(TRUNK, tuple(branch(i, j, True) for i in range(S) for j in range(8)))
    assert (
        generated_tokens([replay(split, config)]) == S * 8 * 2
        and generated_tokens([replay(agreed, config)]) == S * 2 * 2
    )
    assert (
        wanted([True, None], config) == 0 and wanted([None, None], config) == 2 and wanted([True, False], config) == 2
    )


def test_waves_ask_for_all_trees_at_once():
    """What decodes together is the whole wave, not a tree."""
    trees = [ReasoningTree(dataclasses.replace(TRUNK, record_id=name), ()) for name in "ab"]
    asked = []

    def sample(wishes):
        asked.append([(w.tree.trunk.record_id, w.prefix, w.number) for w in wishes])
        return [branch(w.prefix, w.number, w.prefix > 0 or w.number % 2 == 0) for w in wishes]

    grown = explore_waves(trees, AdaptiveConfig(first=1, most=3, wave=1), sample)
    assert asked == [[(name, i, 0) for name in "ab" for i in range(S)]]
    grown = explore_waves(trees, AdaptiveConfig(first=2, most=3, wave=1), sample)
    assert asked[2] == [("a", 0, 2), ("b", 0, 2)]
    assert [b.prefix for b in grown[0].branches] == sorted(b.prefix for b in grown[0].branches)


def test_older_branches_count_as_samples_until_they_are_too_old():
    config = AdaptiveConfig(first=2, most=4, wave=1, max_age=1)
    tree = ReasoningTree(
        TRUNK, (branch(0, 0, True), branch(0, 1, False), dataclasses.replace(branch(1, 0, True), age=1))
    )
    kept = carry_over(tree, config)
    assert [(b.prefix, b.age) for b in kept.branches] == [(0, 1), (0, 1)]
    asked = []

    def sample(wishes):
        asked.extend((w.prefix, w.number) for w in wishes)
        return [branch(w.prefix, w.number, True) for w in wishes]

    [grown] = explore_waves([kept], config, sample)
    # Prefix 0 disagrees already: one more, and one more; their numbers begin anew with the round.
    assert [a for a in asked if a[0] == 0] == [(0, 0), (0, 1)] and len(by_prefix(grown)[0]) == 4
    assert generated_tokens([grown]) == 2 * len(asked)
    assert carry_over(tree, AdaptiveConfig()).branches == ()


def test_a_tree_with_too_few_branches_and_sizes_that_do_not_fit_are_refused():
    short = ReasoningTree(TRUNK, tuple(branch(i, j, j == 0) for i in range(S) for j in range(2)))
    with pytest.raises(ValueError, match=r"record 'r': prefix 0 has 2 branches.*explore with k=8"):
        replay(short, AdaptiveConfig())
    for bad in ({"first": 0}, {"first": 9}, {"wave": 0}, {"max_age": -1}):
        with pytest.raises(ValueError, match="use 1 <= first <= most"):
            AdaptiveConfig(**bad)
