"""Promises of a draw: the filters are those of transformers, thresholds are exact, loops are found where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from srpo_jax.exploration.sampler import LONGEST_PERIOD, Loops, SampleConfig, draw, keep_likely, largest_with

V = 40


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 5, V]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 0.1, 1.0]),
)
def test_filters_keep_what_transformers_keeps(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(scale=3, size=(4, V)).astype(np.float32)
    config = SampleConfig(1, (), temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(keep_likely(jnp.asarray(logits / np.float32(0.7)), config))
    theirs = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    for warper, used in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p < 1 and top_p), (MinPLogitsWarper, min_p)):
        if used:
            theirs = warper(used)(None, theirs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(-np.inf), min_size=2, max_size=12), st.integers(1, 12)
)
def test_the_threshold_is_the_kth_largest_exactly(values, k):
    values = np.asarray(values, np.float32)
    k = min(k, len(values))
    found = largest_with(jnp.asarray(values[None]), jnp.ones((1, len(values))), k)
    assert float(found[0, 0]) == np.sort(values)[-k]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 40),
    st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_a_loop_is_found_where_its_tokens_have_repeated_long_enough(opening, period, tokens):
    text = np.asarray([*opening, *np.arange(period), *np.arange(period)], np.int32)
    loops, found = Loops.start(()), []
    for token in text:
        loops = loops.add(jnp.int32(token))
        found.append(bool(loops.found(tokens)))
    for end, ours in enumerate(found, 1):
        runs = [
            all(text[i] == text[i - p] for i in range(end - tokens, end))
            for p in range(1, LONGEST_PERIOD + 1)
            if end - tokens - p >= 0
        ]
        assert ours == any(runs)


def test_without_loop_tokens_nothing_is_a_loop():
    assert not Loops(jnp.ones(LONGEST_PERIOD, jnp.int32), jnp.full(LONGEST_PERIOD, 99)).found(0)


def test_random_bits_belong_to_key_and_step():
    logits, config = jnp.zeros((3, 1000)), SampleConfig(1, ())
    keys = jax.random.split(jax.random.key(0), 3)
    steps = jnp.asarray([0, 5, 0])
    tokens, _ = draw(logits, keys, steps, config)
    moved, _ = draw(logits, keys[::-1], steps[::-1], config)
    np.testing.assert_array_equal(tokens, moved[::-1])
    later, _ = draw(logits, keys, steps + 1, config)
    assert (tokens != later).all()


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}, {"loop_tokens": -1}],
)
def test_fields_out_of_range_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SampleConfig(**{"max_tokens": 4, "stop_ids": (0,)} | change)
