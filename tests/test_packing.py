"""Promises of packing: little padding, few shapes, and each image and token computed once."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srpo_jax.inputs import Encoded, VisionInputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.geometry import fit_images, window_units
from srpo_jax.models.policy import graph_definition, param_shapes
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.step import ComputeConfig, tree_loss
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Trunk, pack_trees

STEPS, K = 6, 4
SIGMA = 0.6  # of the logarithm of lengths, whose medians are 100 tokens of a branch and 35 of a step
PACK = PackConfig((1536,), path=(512,), rows=(22,), row=256, branches=(24,), branch=(257,), patches=(3072, 6144))
MOST = {
    "min_pixels": 56 * 56,
    "max_pixels": 12_845_056,
    "max_image_tokens": 768,
}  # a released processor, and our budget


def log_normal(rng: np.random.Generator, median: float, count: int, most: int) -> np.ndarray:
    return np.clip(np.rint(median * np.exp(SIGMA * rng.normal(size=count))), 1, most).astype(int)


def random_tree(rng: np.random.Generator) -> ReasoningTree:
    """A photograph or strip of any size up to 4000 pixels a side, a question, six steps and a reply; 24 branches."""
    [(height, width)] = fit_images([tuple(np.exp(rng.uniform(np.log(56), np.log(4000), 2)).astype(int))], 28, **MOST)
    grid = height // 28, width // 28
    patches = 4 * len(window_units(*grid, 4))
    image, question = grid[0] * grid[1], 30 + int(log_normal(rng, 40, 1, 150)[0])
    steps = log_normal(rng, 35, STEPS + 1, 70)
    ends = image + question + np.cumsum([0, *steps[:-1]])
    length = int(ends[-1] + steps[-1])
    slots = np.concatenate([np.arange(image), np.full(length - image, -1)]).astype(np.int32)
    drawn = (np.arange(patches) < 4 * image).astype(int)  # the others fill windows
    vision = VisionInputs(np.zeros((patches, 1), np.float32), np.zeros((patches, 2), np.int32), drawn)
    encoded = Encoded(np.ones(length, np.int32), np.ones((3, length), np.int32), slots, vision)
    branches = [
        Branch(i % STEPS, rng.integers(5, 99, n).astype(np.int32), np.zeros(n, np.float32), "ok", bool(i % 2))
        for i, n in enumerate(log_normal(rng, 100, STEPS * K, 257))
    ]
    return ReasoningTree(Trunk("r", encoded, tuple(int(e) for e in ends)), tuple(branches))


def shapes(batch) -> tuple:
    """What decides which compiled program a batch runs."""
    return tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(batch))


@pytest.mark.parametrize(
    ("count", "together", "rows", "patches", "counted"),
    [
        (2000, 1, (12, 14, 16, 22), (3072, 6144), ("tokens",)),
        (10_240, 32, (15, 16), (1664, 1792, 1920, 2560, 4608), ("tokens", "patches")),
    ],
)
def test_padding_is_at_most_12_percent_and_shapes_at_most_8(count, together, rows, patches, counted):
    """Over random image sizes and log-normal lengths. A mean over more trees varies less: patches vary most.

    Packing adds what is left behind the windows of all pictures; what fills up the windows themselves is the model's layout.
    """
    rng = np.random.default_rng(0)
    pack = dataclasses.replace(PACK, rows=rows, patches=patches)
    seen, total = set(), Counter()
    for _ in range(count // together):
        drawn = [random_tree(rng) for _ in range(together)]
        batch, counters = pack_trees(drawn, pack)
        total.update(counters | {"windows": sum(tree.trunk.encoded.patches for tree in drawn)})
        seen.add(shapes(batch))
    executed = sum(total[f"executed_{name}"] for name in counted)
    assert 1 - sum(total[name.replace("patches", "windows")] for name in counted) / executed <= 0.12
    assert 1 - sum(total[name] for name in counted) / executed <= 0.16
    assert 1 < len(seen) <= 8


TEXT = TextConfig(99, 16, 24, 3, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, False, 512)
VISION = VisionConfig(2, 8, 12, 2, 3, 4, 2, 2, 8, (1,), 16)
CONFIG = ModelConfig(TEXT, VISION, 1, 2, 3, 4)
SMALL = PackConfig((40,), path=(24,), rows=(7, 9), row=8, branches=(6,), branch=(9,), patches=(16, 32))


def small_tree(rng: np.random.Generator) -> ReasoningTree:
    features = int(rng.integers(1, 9))  # windows of one merged feature, four patches
    prompt = 4 + features
    ends = prompt + np.cumsum([0, 3, 2, 4])
    length = int(ends[-1] + rng.integers(1, 9))
    slots = np.concatenate([np.arange(features), np.full(length - features, -1)]).astype(np.int32)
    patches = rng.normal(size=(4 * features, 96)).astype(np.float32)
    vision = VisionInputs(patches, np.zeros((4 * features, 2), np.int32), np.ones(4 * features, np.int32))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
    encoded = Encoded(rng.integers(5, 99, length).astype(np.int32), positions, slots, vision)
    branches = [
        Branch(i % 3, rng.integers(5, 99, n).astype(np.int32), np.zeros(n, np.float32), "ok", i < 3)
        for i, n in enumerate(rng.integers(2, 10, 6))
    ]
    return ReasoningTree(Trunk("r", encoded, tuple(int(e) for e in ends)), tuple(branches))


def loss(params, batch, remat="none"):
    model = nnx.merge(graph_definition(CONFIG), params)
    return jnp.sum(tree_loss(model, batch, LossConfig(), ComputeConfig(remat=remat, logprob_chunk=32))[0])


def test_nothing_is_compiled_after_the_first_batch_of_each_shape():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape), param_shapes(CONFIG))
    programs = []  # a new one is traced first

    @jax.jit
    def counted(params, batch):
        programs.append(shapes(batch))
        return loss(params, batch)

    batches = [pack_trees([small_tree(rng) for _ in range(2)], SMALL)[0] for _ in range(60)]
    first = {shapes(batch): batch for batch in reversed(batches)}
    for batch in first.values():
        counted(params, batch)
    assert 1 < len(programs) == len(first) <= 4
    for batch in batches:
        counted(params, batch)
    assert len(programs) == len(first)


def rows_through(jaxpr, kernel: tuple[int, ...], times: int = 1) -> int:
    """Rows of activations that a traced program multiplies with matrices of a shape, loop bodies as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape == kernel:
            total += times * equation.invars[0].aval.size // kernel[0]
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += rows_through(inner, kernel, inner_times)
    return total


def test_an_update_encodes_each_image_once_and_runs_each_token_once():
    """Counted in the traced forward pass: what goes through the first matrix of the tower, and through the decoder's layers."""
    rng = np.random.default_rng(1)
    batch, counters = pack_trees([small_tree(rng) for _ in range(2)], SMALL)
    params = param_shapes(CONFIG)
    patches = counters["executed_patches"]
    embedding = VISION.patch_dim, VISION.hidden_size
    forward = jax.make_jaxpr(loss)(params, batch).jaxpr
    assert rows_through(forward, embedding) == patches
    assert rows_through(forward, (16, 24)) == 2 * TEXT.num_layers * counters["executed_tokens"]  # gate and up
    # The count sees a second encode, and what a backward pass computes again.
    twice = jax.make_jaxpr(lambda p, b: loss(p, b) + loss(p, b))(params, batch).jaxpr
    assert rows_through(twice, embedding) == 2 * patches
    again = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b, "full")))(params, batch).jaxpr
    assert rows_through(again, (16, 24)) >= 4 * TEXT.num_layers * counters["executed_tokens"]
