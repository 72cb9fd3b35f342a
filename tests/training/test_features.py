"""Promises of the feature cache: the same trees bit by bit, the same updates, no tower in their programs, a bounded memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.exploration.explorer import ExploreConfig
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.files import read_jsonl
from srpo_jax.judges.verdict import Verdict
from srpo_jax.models.features import FeatureCache
from srpo_jax.training.data import BatchConfig, EncodedTrees, step_batches
from srpo_jax.training.loop import RunConfig, train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, init_state
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.trees import PackConfig, ReasoningTree

RUN = RunConfig(
    explore=ExploreConfig(k=4, max_tokens=10, trees=4, trunk=(144,), patches=(16,)),
    loss=LossConfig(),
    optim=OptimConfig(1e-2, steps=2, schedule="constant"),
    pack=PackConfig((144,), (112,), (8, 20), 20, (24,), (10,), (16,)),
    batch=BatchConfig(trees=4),
    compute=ComputeConfig(remat="none"),
    updates=2,
    checkpoint_every=2,
    max_truncated=1.0,
    max_unknown=1.0,
    trainable=("^head$", "^norm/"),
)
ROOM = 1 << 20


@pytest.fixture(scope="module")
def records():
    """Four records with different pictures, the second without any."""
    made = scenes.records("train", 8)[::2]  # a record's neighbour is its twin
    return [dataclasses.replace(r, images=()) if i == 1 else r for i, r in enumerate(made)]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def cache(policy, room=ROOM):
    return FeatureCache(policy, policy.params, jnp.float32, room)


def judge(record, path):
    return Verdict(safe="rest" in path.answer, effective="rest" in path.answer, reason="")


def test_a_run_is_the_same_with_and_without_features_kept(tiny_policy, records, mesh, tmp_path):
    """Trees bit by bit; losses and parameters of two updates up to the rounding of two programs."""
    told = {}
    for size in (0.0, 0.001):
        folder = tmp_path / str(size)
        folder.mkdir()
        config = dataclasses.replace(RUN, compute=dataclasses.replace(RUN.compute, image_cache=size))
        params = train(tiny_policy, records, judge, config, folder, mesh)
        trees = sorted((folder / "trees/round_000/branches.jsonl").read_text().splitlines())
        metrics = list(read_jsonl(folder / "metrics.jsonl"))
        losses = [{k: x for k, x in line.items() if not k.startswith("batch/")} for line in metrics]
        told[size] = params, trees, losses
    (wanted, trees, losses), (found, alike, close) = told.values()
    assert trees == alike
    assert [line.keys() for line in losses] == [line.keys() for line in close]
    for line, other in zip(losses, close, strict=True):
        assert other == pytest.approx(line, rel=1e-5, abs=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


def test_the_updates_program_has_no_tower(tiny_policy, records, mesh):
    trees = [ReasoningTree(make_trunk(record, tiny_policy.processor), ()) for record in records]
    optimizer = RUN.optim.make()
    state = init_state(tiny_policy.params, optimizer, RUN.trainable, mesh)
    update = make_update(tiny_policy.graphdef, optimizer, RUN.loss, RUN.compute, mesh, state)
    kernel = tiny_policy.params["vision"]["patch_embed"]["kernel"].shape
    for source, wanted in ((trees, 1), (EncodedTrees(trees, cache(tiny_policy)), 0)):
        [batch] = step_batches(source, RUN.pack, RUN.batch, 0, 1)
        program = jax.make_jaxpr(update.compiled)(state.moving(), state.frozen, batch.batches)
        assert products_with(program.jaxpr, kernel) == wanted


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


def test_memory_is_bounded_and_what_was_forgotten_comes_back_the_same(tiny_policy, records):
    encoded = [make_trunk(record, tiny_policy.processor).encoded for record in records]
    drawn = [one for one in encoded if one.vision is not None]
    every = [cache(tiny_policy)(example).features for example in drawn]
    small = cache(tiny_policy, room=every[0].nbytes)
    for index in (0, 0, 1, 2, 0, 1):
        np.testing.assert_array_equal(small(drawn[index]).features, every[index])
    assert small.encoded == 5 and sum(x.nbytes for x in small._kept.values()) <= small.room
    plain = next(one for one in encoded if one.vision is None)
    assert small(plain) is plain


def test_features_of_a_tower_that_trains_are_refused(tiny_policy, records, mesh, tmp_path):
    config = dataclasses.replace(RUN, compute=ComputeConfig(image_cache=1.0), trainable=None)
    with pytest.raises(ValueError, match=r"compute.image_cache=1.0 keeps.*parameters train \(vision/.*set it to 0"):
        train(tiny_policy, records, judge, config, tmp_path, mesh)
