"""Promises of the feature cache: the same trees and updates bit by bit, no tower in their programs, a bounded memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.exploration.explorer import ExploreConfig, explore_shape, sample_trees
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.models.features import FeatureCache
from srpo_jax.training.data import BatchConfig, EncodedTrees, step_batches
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, init_state
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.trees import Branch, PackConfig, ReasoningTree

EXPLORE = ExploreConfig(k=2, max_tokens=8, trees=2, prefill=2, trunk=(144,), patches=(16,), prefixes=(0, 3))
PACK = PackConfig((144,), (112,), (14,), 20, (4,), (10,), (16,))
ROOM = 1 << 20


@pytest.fixture(scope="module")
def trunks(tiny_policy):
    """Four trunks of different pictures, the second without any."""
    made = scenes.records("train", 8)[::2]  # a record's neighbour is its twin
    return [
        make_trunk(dataclasses.replace(r, images=()) if i == 1 else r, tiny_policy.processor)
        for i, r in enumerate(made)
    ]


@pytest.fixture(scope="module")
def trees(trunks):
    rng = np.random.default_rng(0)

    def branches():
        for m in range(4):
            tokens = rng.integers(5, 200, rng.integers(2, 10)).astype(np.int32)
            yield Branch(m // 2, tokens, np.zeros(len(tokens), np.float32), "ok", bool(m % 2))

    return [ReasoningTree(trunk, tuple(branches())) for trunk in trunks]


def cache(policy, room=ROOM):
    return FeatureCache(policy, policy.params, jnp.float32, room)


def test_trees_are_the_same_bits_with_and_without_features_kept(tiny_policy, trunks):
    shape = explore_shape(tiny_policy, trunks, EXPLORE)

    def explored(features):
        found = sample_trees(tiny_policy, tiny_policy.params, trunks, EXPLORE, jax.random.key(0), shape, features)
        return {tree.trunk.record_id: tree.branches for tree in found}

    wanted, features = explored(None), cache(tiny_policy)
    for found in (explored(features), explored(features), explored(cache(tiny_policy, room=0))):
        assert found.keys() == wanted.keys()
        for name, branches in found.items():
            for ours, theirs in zip(branches, wanted[name], strict=True):
                np.testing.assert_array_equal(ours.tokens, theirs.tokens)
                np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert features.encoded == 3


def updates(policy, trees, features):
    """Two updates with a frozen tower: the traced program, and what comes out."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer = OptimConfig(1e-2, steps=2, schedule="constant").make()
    state = init_state(policy.params, optimizer, ("^layers/", "^head$"), mesh)
    update = make_update(policy.graphdef, optimizer, LossConfig(), ComputeConfig(remat="none"), mesh, state)
    source = trees if features is None else EncodedTrees(trees, features)
    batches = [sharding.place_batch(b.batches, mesh) for b in step_batches(source, PACK, BatchConfig(4), 0, 2)]
    program = jax.make_jaxpr(update.compiled)(state.moving(), state.frozen, batches[0]).jaxpr
    for batch in batches:
        state, metrics = update(state, batch)
    return program, state.params | metrics


def test_updates_are_the_same_bits_and_their_program_has_no_tower(tiny_policy, trees):
    with_tower, wanted = updates(tiny_policy, trees, None)
    features = cache(tiny_policy)
    without, found = updates(tiny_policy, trees, features)
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert features.encoded == 3  # of six readings in two updates
    kernel = tiny_policy.params["vision"]["patch_embed"]["kernel"].shape
    assert products_with(with_tower, kernel) == 1 and products_with(without, kernel) == 0


def products_with(jaxpr, kernel: tuple[int, ...]) -> int:
    """Products with matrices of a shape in a program, its inner programs included."""
    found = sum(
        e.primitive.name == "dot_general" and kernel in (e.invars[0].aval.shape, e.invars[1].aval.shape)
        for e in jaxpr.eqns
    )
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += products_with(inner, kernel) if hasattr(inner, "eqns") else 0
    return found


def test_memory_is_bounded_and_what_was_forgotten_comes_back_the_same(tiny_policy, trunks):
    drawn = [trunk.encoded for trunk in trunks if trunk.encoded.vision is not None]
    every = [cache(tiny_policy)(example).features for example in drawn]
    small = cache(tiny_policy, room=every[0].nbytes)
    for index in (0, 0, 1, 2, 0, 1):
        np.testing.assert_array_equal(small(drawn[index]).features, every[index])
    assert small.encoded == 5 and sum(x.nbytes for x in small._kept.values()) <= small.room
    plain = next(trunk.encoded for trunk in trunks if trunk.encoded.vision is None)
    assert small(plain) is plain
