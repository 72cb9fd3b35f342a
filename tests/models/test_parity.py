"""Promise: the same checkpoint computes the same numbers as transformers does in torch, and the check would notice if
any bias, norm, window, rotary section or image were wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from srpo_jax.inputs import VisionInputs
from srpo_jax.models import geometry, hf
from srpo_jax.models import vision as vision_module
from srpo_jax.models.policy import forward, graph_definition, pad_batch
from srpo_jax.models.vision import VisionTower
from srpo_jax.sharding import flatten, unflatten

TOLERANCE = 1e-4
GAP = 1e-3
VARIANTS = ("untied", "tied", "full")


@pytest.fixture(params=VARIANTS)
def case(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture
def examples(picture):
    """A batch of different lengths: odd sizes, two images of different sizes, extreme sizes, text only."""
    return [
        ([picture(101, 57, 1)], "What is shown?"),
        ([picture(140, 84, 2), picture(45, 120, 3)], "Do the two pictures fit, and which of them is the larger one?"),
        ([], "A question without any picture."),
        ([picture(13, 9, 4), picture(400, 390, 5), picture(56, 56, 6)], ""),
    ]


def torch_logits(case, images, question):
    with torch.no_grad():
        return case.torch(**case.torch_inputs(images, question)).logits[0].numpy()


def encode(policy, examples):
    return policy.encode([{"images": images, "question": question} for images, question in examples])


def largest_error(case, examples, params=None, policy=None, inputs=None) -> float:
    """Largest difference of any logit of any valid token from transformers'."""
    policy = policy or case.policy
    inputs = encode(policy, examples) if inputs is None else inputs
    logits = np.asarray(forward(policy, case.policy.params if params is None else params, inputs))
    worst = 0.0
    for row, (images, question) in zip(logits, examples, strict=True):
        wanted = torch_logits(case, images, question)
        assert wanted.std() >= 1
        worst = max(worst, np.abs(row[: len(wanted)] - wanted).max())
    return worst


def test_logits_equal(case, examples):
    assert largest_error(case, examples) < TOLERANCE


def test_tokens_positions_and_patches_equal(case, examples):
    for images, question in examples:
        wanted = case.torch_inputs(images, question)
        ours = case.policy.processor.encode(images, question)
        np.testing.assert_array_equal(ours.tokens, wanted["input_ids"][0])
        grids = wanted.get("image_grid_thw")
        positions, _ = case.torch.model.get_rope_index(
            wanted["input_ids"], wanted["mm_token_type_ids"], image_grid_thw=grids
        )
        np.testing.assert_array_equal(ours.positions, positions[:, 0])
        if not images:
            assert ours.vision is None
            continue
        pixels = np.zeros_like(wanted["pixel_values"])
        slots = ours.image_slots[ours.image_slots >= 0]
        pixels = ours.vision.patches.reshape(-1, 4, pixels.shape[-1])[slots].reshape(pixels.shape)
        np.testing.assert_array_equal(pixels, wanted["pixel_values"])


def test_vision_features_equal_after_every_layer(case, picture):
    config, images = case.policy.config.vision, [picture(140, 84, 2), picture(45, 120, 3)]
    wanted = case.torch_inputs(images, "")
    with torch.no_grad():
        tower = case.torch.model.visual(wanted["pixel_values"], wanted["image_grid_thw"], output_hidden_states=True)
    encoded = case.policy.processor.encode(images, "")
    vision = VisionInputs(*(jnp.asarray(field)[None] for field in encoded.vision))
    real = np.asarray(encoded.vision.images) > 0
    params = case.policy.params["vision"]
    for depth in range(1, config.depth + 1):
        blocks = jax.tree.map(lambda x, n=depth: x[:n], params["blocks"])
        shallow = dataclasses.replace(config, depth=depth)
        graphdef = nnx.split(nnx.eval_shape(lambda c=shallow: VisionTower(c, nnx.Rngs(0))))[0]
        module = nnx.merge(graphdef, {**params, "blocks": blocks})
        states = np.asarray(module.encode(vision))[0][real]
        # hidden_states[i] is what enters layer i; the last entry has left the last layer.
        np.testing.assert_allclose(states, tower.hidden_states[depth], atol=TOLERANCE)
    slots = encoded.image_slots[encoded.image_slots >= 0]
    np.testing.assert_allclose(np.asarray(module(vision))[0][slots], tower.pooler_output, atol=TOLERANCE)


def test_greedy_tokens_equal(case, picture):
    images, question, count = [picture(101, 57, 1)], "What is shown?", 64
    inputs = case.torch_inputs(images, question)
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        wanted = case.torch.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=-1)[
            0, prompt:
        ].numpy()
    assert len(wanted) == count
    assert len(set(wanted.tolist())) > 5
    encoded = case.policy.processor.encode(images, question).append(wanted)
    inputs = pad_batch([encoded], case.policy.config)
    logits = np.asarray(forward(case.policy, case.policy.params, inputs))[0, prompt - 1 : prompt - 1 + count]
    first, second = np.sort(logits, axis=-1)[:, :-3:-1].T
    clear = first - second > GAP
    assert clear.sum() > 0.9 * count
    np.testing.assert_array_equal(logits.argmax(-1)[clear], wanted[clear])


# The check must be able to fail: each of the following breaks it by far more than the tolerance.


def silenced(params, path, layer):
    """`params` with one layer's bias at zero, or one norm's scale at one."""
    flat = flatten(params)
    neutral = jnp.ones_like if path.endswith("scale") else jnp.zeros_like
    index = ... if layer is None else layer
    flat[path] = flat[path].at[index].set(neutral(flat[path][index]))
    return unflatten(flat)


def test_dropping_any_bias_or_norm_shows(checkpoint, examples):
    case = checkpoint("untied")
    table = hf.sources(case.policy.config)
    paths = [path for path in table if path.endswith(("/bias", "/scale"))]
    assert len(paths) == 3 + 3 + 7 + 2 + 3  # decoder biases and norms, vision block biases and norms, merger
    inputs = encode(case.policy, examples)
    logits = forward(case.policy, case.policy.params, inputs)
    valid = np.arange(logits.shape[1]) < np.asarray(inputs.lengths)[:, None]
    for path in paths:
        for layer in range(len(table[path].names)) if table[path].stacked else [None]:
            broken = forward(case.policy, silenced(case.policy.params, path, layer), inputs)
            assert np.abs(np.asarray(broken - logits))[valid].max() > 10 * TOLERANCE, (path, layer)


def broken_policy(policy, **changes):
    text = dataclasses.replace(policy.config.text, **changes.get("text", {}))
    vision = dataclasses.replace(policy.config.vision, **changes.get("vision", {}))
    config = dataclasses.replace(policy.config, text=text, vision=vision)
    return dataclasses.replace(policy, config=config, graphdef=graph_definition(config))


def test_full_attention_in_all_vision_layers_shows(checkpoint, examples):
    case = checkpoint("untied")
    broken = broken_policy(case.policy, vision={"fullatt_block_indexes": (0, 1, 2)})
    assert largest_error(case, examples[:2], policy=broken) > 10 * TOLERANCE


def test_swapped_rotary_sections_show(checkpoint, examples):
    case = checkpoint("untied")
    broken = broken_policy(case.policy, text={"mrope_section": (1, 1, 2)})
    assert largest_error(case, examples[:2], policy=broken) > 10 * TOLERANCE
    inputs = encode(case.policy, examples[:2])
    swapped = inputs._replace(positions=inputs.positions[:, jnp.array([0, 2, 1])])
    assert largest_error(case, examples[:2], inputs=swapped) > 10 * TOLERANCE


def test_swapped_images_show(checkpoint, picture):
    case = checkpoint("untied")
    first, second = picture(84, 84, 1), picture(84, 84, 2)
    inputs = encode(case.policy, [([second, first], "Which one?")])
    assert largest_error(case, [([first, second], "Which one?")], inputs=inputs) > 10 * TOLERANCE


def test_padding_does_not_reach_the_logits(checkpoint, examples):
    case = checkpoint("untied")
    inputs = encode(case.policy, examples)
    rng = np.random.default_rng(0)
    padding = (np.asarray(inputs.vision.images) == 0)[..., None]
    noise = rng.normal(size=inputs.vision.patches.shape).astype(np.float32)
    patches = np.where(padding, noise, inputs.vision.patches)
    beyond = np.arange(inputs.tokens.shape[1]) >= np.asarray(inputs.lengths)[:, None]
    tokens = np.where(beyond, rng.integers(0, 200, inputs.tokens.shape), inputs.tokens)
    noisy = inputs._replace(tokens=tokens, vision=inputs.vision._replace(patches=patches))
    assert padding.any()
    assert largest_error(case, examples, inputs=noisy) < TOLERANCE


def test_float64_and_gradients(checkpoint, examples):
    """The same module in float64 agrees with float32, and no way of rematerialising changes a gradient."""
    case = checkpoint("untied")
    inputs = encode(case.policy, examples[:2])
    single = np.asarray(forward(case.policy, case.policy.params, inputs))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), case.policy.params)
        wide = forward(case.policy, params, inputs)
        assert wide.dtype == jnp.float64
        valid = np.arange(wide.shape[1]) < np.asarray(inputs.lengths)[:, None]
        assert np.abs(np.asarray(wide) - single)[valid].max() < TOLERANCE

        def loss(params, remat):
            model = nnx.merge(case.policy.graphdef, params)
            logits = model(inputs, remat=remat)
            return jnp.mean(jnp.where(valid[..., None], logits, 0) ** 2)

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        plain, selective, full = (flatten(jax.device_get(grad(params, how))) for how in ("none", "selective", "full"))
        kept = [saved_bytes(loss, params, how) for how in ("none", "selective", "full")]
    scale = max(np.abs(x).max() for x in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(selective[path], leaf, atol=1e-12 * scale, err_msg=path)
        np.testing.assert_allclose(full[path], leaf, atol=1e-12 * scale, err_msg=path)
        assert np.abs(leaf).max() > 0, path
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


def saved_bytes(loss, params, remat) -> int:
    """What the forward pass hands to the backward pass."""
    backward = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, remat), p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_long_images_attend_in_chunks(checkpoint, monkeypatch, size):
    """Full attention in chunks of queries is the same function, also when the chunks do not divide the patches."""
    rng = np.random.default_rng(size)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 10, 2, 4))) for _ in range(3))
    images = jnp.asarray(np.sort(rng.integers(0, 3, (2, 10))))
    whole = vision_module._attend_images(q, k, v, images)
    monkeypatch.setattr(vision_module, "QUERY_CHUNK", size)
    np.testing.assert_allclose(vision_module._attend_images(q, k, v, images), whole, rtol=1e-5, atol=1e-6)


def test_window_order_equals_transformers():
    for side in (1, 2, 3, 4):
        for rows, columns in [(1, 1), (2, 3), (4, 4), (5, 7), (8, 3), (9, 12)]:
            grid = torch.tensor([[1, 2 * rows, 2 * columns]])
            index, ends = get_vision_window_index(grid, 2, 28 * side, 14)
            order = geometry.window_units(rows, columns, side)
            np.testing.assert_array_equal(order[order >= 0], index)
            filled = (order.reshape(-1, side**2) >= 0).sum(-1) * 4
            np.testing.assert_array_equal(np.cumsum(filled), ends[1:])
            np.testing.assert_array_equal(geometry.patch_positions(rows, columns, 2), get_vision_position_ids(grid, 2))
