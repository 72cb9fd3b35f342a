"""Promises of the train state: schedule, decay, clipping, what trains and in which precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax import sharding
from srpo_jax.training.state import OptimConfig, abstract_state, decays, init_state, select_trainable


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def half(tiny_policy):
    """The parameters as a bfloat16 checkpoint holds them."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_policy.params)


def test_cosine_warms_up_to_the_peak_and_ends_at_the_final_share():
    rate = OptimConfig(2.0, steps=110, warmup=10, final=0.1).learning_rates()
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0.2, 1.1, 2.0, 1.1, 0.2], rtol=1e-6)
    values = np.asarray([rate(step) for step in range(111)])
    assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()


@pytest.mark.parametrize("warmup", [0, 4])
def test_constant_stays_at_the_peak(warmup):
    rate = OptimConfig(2.0, steps=10, warmup=warmup, schedule="constant").learning_rates()
    np.testing.assert_allclose([rate(step) for step in range(warmup, 20)], 2.0)
    assert warmup == 0 or rate(0) == 0.5


def test_without_warmup_the_first_update_has_the_peak():
    assert OptimConfig(2.0, steps=10).learning_rates()(0) == 2.0


@pytest.mark.parametrize("options", [{"schedule": "linear"}, {"warmup": 11}])
def test_impossible_schedules_are_refused(options):
    with pytest.raises(ValueError, match=r"use 'cosine' or 'constant' and a warm-up within"):
        OptimConfig(1.0, steps=10, **options)


def test_weight_decay_reaches_every_matrix_and_nothing_else(tiny_policy):
    params = sharding.flatten(tiny_policy.params)
    stacked = ("layers/", "vision/layers/", "vision/blocks/")
    matrices = {path for path, x in params.items() if x.ndim - path.startswith(stacked) >= 2}
    assert matrices and {path for path in params if path.endswith(("scale", "bias"))} == params.keys() - matrices
    assert {path for path in params if decays(path)} == matrices
    optimizer = OptimConfig(0.5, steps=1, schedule="constant", weight_decay=0.1).make()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for path, x in params.items():
        np.testing.assert_allclose(updates[path], -0.05 * x * (path in matrices), rtol=1e-5)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_clipping_scales_the_whole_gradient_to_the_norm(clip):
    """Adam forgets the scale of one gradient but not of a second: a small one, then a huge one."""
    params = {"a/kernel": jnp.ones((2, 2)), "b/bias": jnp.ones(3)}
    small = jax.tree.map(lambda x: 0.1 * x, params)
    huge = jax.tree.map(lambda x: 1000.0 * x, params)
    norm = float(optax.tree.norm(huge))
    clipped = jax.tree.map(lambda x: x / norm, huge)

    def second_update(optimizer, last):
        _, state = optimizer.update(small, optimizer.init(params), params)
        return optimizer.update(last, state, params)[0]["a/kernel"]

    ours = second_update(OptimConfig(1.0, steps=9, clip=clip).make(), huge)
    plain = OptimConfig(1.0, steps=9, clip=0.0).make()
    expected = second_update(plain, clipped if clip else huge)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert not np.allclose(second_update(plain, clipped), second_update(plain, huge), rtol=0.05)


def test_trainable_parameters_get_a_float32_master_and_frozen_ones_stay_as_they_are(half, mesh):
    optimizer = OptimConfig(1e-3, steps=9).make()
    state = init_state(half, optimizer, ("^layers/", "norm/scale$"), mesh)
    flat = sharding.flatten(half)
    assert state.params.keys() | state.frozen.keys() == flat.keys()
    assert state.params.keys() == {path for path in flat if path.startswith("layers/") or path.endswith("norm/scale")}
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.params.values())
    assert jax.tree.structure(state.all_params()) == jax.tree.structure(half)
    # An update far below bfloat16's resolution is not lost.
    tiny = {path: jnp.full_like(x, 1e-6) for path, x in state.params.items()}
    moved = optax.apply_updates(state.params, tiny)
    assert all((moved[path] != x).mean() > 0.9 for path, x in state.params.items())


def test_the_abstract_state_is_the_state_without_its_numbers(half, mesh):
    optimizer, patterns = OptimConfig(1e-3, steps=9).make(), ("vision", "head")
    state = init_state(half, optimizer, patterns, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), half)
    abstract = abstract_state(shapes, optimizer, patterns, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)


def test_a_pattern_that_matches_nothing_is_refused(tiny_policy):
    with pytest.raises(
        ValueError, match=r"trainable='^visoin' matches no parameter; there are \['embed'".replace("^", r"\^")
    ):
        select_trainable(tiny_policy.params, ("layers", "^visoin"))
