"""Promises of adapters and of the int8 base: what they compute, what is stored, what a gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srpo_jax import sharding
from srpo_jax.models.hf import param_shapes
from srpo_jax.models.layers import quantised_product
from srpo_jax.models.lora import LoraConfig, init_adapters, merged
from srpo_jax.models.policy import adapt, forward, graph_definition, load_policy
from srpo_jax.models.quantize import compute_params, dequantised, is_quantisable, round_to_int8
from srpo_jax.sharding import flatten, unflatten

EVERYWHERE = LoraConfig(rank=3, alpha=5.0, targets=("^layers/", "^vision/blocks/", "merger/"))


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("tied").policy


@pytest.fixture(scope="module")
def inputs(base, picture):
    examples = [{"image": picture(90, 60), "question": "What is shown?"}, {"question": "user system"}]
    return base.encode(examples)


def moved(policy, seed=0):
    """The policy with adapters that all say something."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(scale=0.2, size=x.shape), x.dtype) if path.endswith("lora_b") else x
        for path, x in flatten(policy.params).items()
    }
    return unflatten(flat)


def valid(logits, inputs):
    return np.asarray(logits)[np.arange(logits.shape[1]) < np.asarray(inputs.lengths)[:, None]]


def test_fresh_adapters_change_no_bit_and_are_drawn_as_peft_draws_them(base, inputs):
    policy = adapt(base, EVERYWHERE, seed=1)
    np.testing.assert_array_equal(
        forward(policy, policy.params, inputs), forward(base, base.params, inputs), strict=True
    )
    flat, kernels = flatten(policy.params), flatten(base.params)
    adapted = {path.removesuffix("/lora_a") for path in flat if path.endswith("lora_a")}
    assert adapted == {p.removesuffix("/kernel") for p in kernels if p.endswith("kernel")} - {"vision/patch_embed"}
    for path in adapted:
        kernel, a = kernels[f"{path}/kernel"], np.asarray(flat[f"{path}/lora_a"])
        assert a.shape == (*kernel.shape[:-1], 3) and a.dtype == np.float32
        assert flat[f"{path}/lora_b"].shape == (*kernel.shape[:-2], 3, kernel.shape[-1])
        bound = kernel.shape[-2] ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.2 * bound
        np.testing.assert_allclose(flat[f"{path}/lora_scale"], 5 / 3)
    again, fewer = adapt(base, EVERYWHERE, 1), adapt(base, LoraConfig(rank=3, targets=("mlp/up",)), 1)
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
    name = "layers/mlp/up/lora_a"  # does not depend on which other kernels have adapters
    np.testing.assert_array_equal(flatten(fewer.params)[name], flat[name])
    assert (flatten(adapt(base, EVERYWHERE, 2).params)[name] != flat[name]).any()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_merged_parameters_give_the_adapted_logits_to_1e_5(checkpoint, inputs, quantize, tmp_path):
    """In fp32, from a folder that is tied, and whatever the base is stored as."""
    policy = adapt(load_policy(checkpoint("tied").folder, quantize=quantize), EVERYWHERE, seed=1)
    params = moved(policy)
    adapted = forward(policy, params, inputs)
    assert np.abs(valid(adapted - forward(policy, policy.params, inputs), inputs)).max() > 0.1
    policy.save(tmp_path / "merged", params)
    exported = load_policy(tmp_path / "merged")
    assert exported.config.text.tie_word_embeddings and "head" not in exported.params
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), exported.params) == param_shapes(
        policy.config
    )
    logits = forward(exported, exported.params, inputs)
    np.testing.assert_allclose(valid(logits, inputs), valid(adapted, inputs), atol=1e-5 * float(jnp.abs(adapted).max()))


def test_the_product_of_the_factors_is_never_formed(base, inputs):
    """No array of a kernel's shape is made: neither in the forward pass nor by the gradient of the adapters."""
    policy = adapt(base, LoraConfig(rank=3), seed=1)
    flat = flatten(policy.params)
    move = {path: x for path, x in flat.items() if path.endswith(("lora_a", "lora_b"))}
    rest = {path: x for path, x in flat.items() if path not in move}

    def loss(move, rest):
        return jnp.sum(nnx.merge(policy.graphdef, unflatten(rest | move))(inputs) ** 2)

    shapes = {flat[f"layers/{name}/kernel"].shape[1:] for name in ("mlp/up", "mlp/down")}
    made = [eqn for eqn in equations(jax.make_jaxpr(jax.grad(loss))(move, rest).jaxpr) if eqn.primitive.name != "copy"]
    dots = [eqn.outvars[0].aval.shape for eqn in made if eqn.primitive.name == "dot_general"]
    assert any(3 in shape for shape in dots)
    assert not shapes & set(dots) and not {shape[::-1] for shape in shapes} & set(dots)


def equations(jaxpr):
    """Every equation of a program, of the programs in it, too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_an_int8_base_stores_int8(checkpoint, base):
    policy = load_policy(checkpoint("tied").folder, quantize="int8")
    flat, plain = flatten(policy.params), flatten(base.params)
    kernels = {path for path in plain if is_quantisable(path)}
    assert len(kernels) == 14
    for path in plain:
        assert flat[path].dtype == (jnp.int8 if path in kernels else jnp.float32)
    added = flat.keys() - plain.keys()
    assert added == {path.replace("kernel", "kernel_scale") for path in kernels}
    assert all(flat[path].dtype == jnp.float32 and flat[path].ndim == 2 for path in added)
    size = sum(flat[path].nbytes for path in flat if is_quantisable(path))
    assert size == sum(plain[path].size for path in kernels)
    # The dtype of a step reaches neither int8 values nor scales.
    cast = flatten(compute_params(policy.params, jnp.bfloat16))
    assert all(cast[path].dtype == flat[path].dtype for path in kernels | added)
    assert cast["embed"].dtype == jnp.bfloat16


def test_rounding_to_int8_moves_no_weight_by_more_than_half_a_step():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, 50, 7)) * 10.0 ** rng.integers(-3, 3, 7), jnp.float32)
    kernel = kernel.at[:, :, 3].set(0.0)
    values, scale = round_to_int8(kernel)
    assert values.dtype == jnp.int8 and scale.shape == (2, 7)
    gap = jnp.abs(dequantised(values, scale) - kernel)
    assert (gap <= scale[:, None] * 0.5001).all() and (gap[:, :, 3] == 0).all()
    assert (jnp.abs(values).max(1) == 127).sum() == 2 * 6


def test_int8_costs_little(checkpoint, base, inputs):
    """On random weights of normal kernels: log-probs stay within 5 % (root mean square) of their spread."""
    policy = load_policy(checkpoint("tied").folder, quantize="int8")
    plain = valid(jax.nn.log_softmax(forward(base, base.params, inputs)), inputs)
    rounded = valid(jax.nn.log_softmax(forward(policy, policy.params, inputs)), inputs)
    error = np.sqrt(np.mean((plain - rounded) ** 2))
    assert 0 < error < 0.05 * plain.std()


def test_gradients_through_an_int8_kernel_are_those_of_the_kernel_it_stands_for():
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 20), (4, 6)))
    values, scale = round_to_int8(jnp.asarray(rng.normal(size=(20, 6)), jnp.float32))

    def loss(x, product):
        return jnp.sum(jnp.sin(product(x)) * weights)

    ours = jax.grad(loss)(x, lambda x: quantised_product(x, values, scale))
    theirs = jax.grad(loss)(x, lambda x: x @ dequantised(values, scale))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "selective"))])
def test_adapters_on_an_int8_base_get_the_gradients_of_the_dequantised_base(checkpoint, inputs, remat):
    policy = adapt(load_policy(checkpoint("tied").folder, quantize="int8"), EVERYWHERE, seed=1)
    flat = flatten(moved(policy))
    move = {path: x for path, x in flat.items() if path.endswith(("lora_a", "lora_b"))}
    rest = {path: x for path, x in flat.items() if path not in move}
    constants = {path: x for path, x in rest.items() if path.endswith("lora_scale")}
    mask = (np.arange(inputs.tokens.shape[1]) < np.asarray(inputs.lengths)[:, None])[..., None]

    def grads(rest):
        graphdef = graph_definition(policy.config, unflatten(rest | move))

        def loss(move, rest):
            return jnp.mean(nnx.merge(graphdef, unflatten(rest | move))(inputs, remat=remat) ** 2 * mask)

        return jax.jit(jax.grad(loss))(move, rest)

    ours, expected = grads(rest), grads(flatten(merged(unflatten(rest))) | constants)
    for path, wanted in expected.items():
        size = float(jnp.abs(wanted).max())
        assert size > 0
        np.testing.assert_allclose(ours[path], wanted, atol=2e-5 * size, err_msg=path)


def test_adapters_are_split_like_the_sides_of_their_kernel():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES)
    for name, shape in (("attention/q", (3, 8, 4)), ("mlp/down", (3, 4, 8))):
        kernel = sharding.spec_of(f"layers/{name}/kernel", shape, mesh)
        a = sharding.spec_of(f"layers/{name}/lora_a", (3, shape[1], 2), mesh)
        b = sharding.spec_of(f"layers/{name}/lora_b", (3, 2, shape[2]), mesh)
        assert (a[1], b[2]) == (kernel[1], kernel[2]) and a[2] is None and b[1] is None
        assert not any(sharding.spec_of(f"layers/{name}/lora_scale", (3,), mesh))
        assert not any(sharding.spec_of(f"layers/{name}/kernel_scale", (3, shape[2]), mesh))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 4, "alpha": 0.0}, r"alpha=0\.0"),
        ({"rank": 4, "targets": ()}, "at least one target"),
    ],
)
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(base):
    with pytest.raises(
        ValueError, match=r"lora\.targets: 'q_proj' matches no linear map; there are layers/attention/k, "
    ):
        init_adapters(base.params, LoraConfig(2, targets=("q_proj",)), 0)
    with pytest.raises(ValueError, match="patch_embed"):
        init_adapters(base.params, LoraConfig(2, targets=("patch_embed",)), 0)
    once = adapt(base, LoraConfig(2), 0)
    with pytest.raises(ValueError, match="has adapters already, of layers/attention/k"):
        adapt(once, LoraConfig(2), 0)
    with pytest.raises(ValueError, match="quantize='int4': use 'int8' or None"):
        load_policy("nowhere", quantize="int4")
