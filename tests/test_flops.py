"""The formulas count what the traced programs multiply."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax import flops
from srpo_jax.flops import CHIPS, TreeSize
from srpo_jax.inputs import Encoded, VisionInputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.hf import param_shapes
from srpo_jax.models.policy import graph_definition
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.sharding import flatten, unflatten
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Trunk, pack_trees

# Two attention windows of 16 patches; vision layer 1 of 3 attends to the whole image.
TEXT = TextConfig(64, 32, 48, 3, 4, 2, 8, 1e4, (2, 1, 1), 1e-6, False, 512)
VISION = VisionConfig(3, 32, 40, 2, 3, 14, 2, 2, 56, (1,), 32)
UNTIED = ModelConfig(TEXT, VISION, 1, 2, 3, 4)
TIED = dataclasses.replace(UNTIED, text=dataclasses.replace(TEXT, tie_word_embeddings=True))
CHUNK = 8


def count(jaxpr, inside: int = 1) -> int:
    """Operations of all matrix products of a traced program, loop bodies as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * inside * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        if equation.primitive.name == "cond":  # vision layers choose between window and image
            total += max(count(branch.jaxpr, inside) for branch in equation.params["branches"])
            continue
        times = inside * equation.params.get("length", 1) if equation.primitive.name == "scan" else inside
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                total += count(inner, times)
    return total


@functools.cache
def tree(prompt: int = 28, branches: int = 4, patches: int = 32) -> ReasoningTree:
    rng = np.random.default_rng(0)
    length = prompt + 12
    slots = np.full(length, -1, np.int32)
    vision = None
    if patches:
        slots[2 : 2 + patches // 4] = np.arange(patches // 4)
        grid = np.stack(np.divmod(np.arange(patches), 4), -1).astype(np.int32)
        vision = VisionInputs(rng.normal(size=(patches, 1176)).astype(np.float32), grid, np.ones(patches, np.int32))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
    encoded = Encoded(rng.integers(5, 64, length).astype(np.int32), positions, slots, vision)
    made = [
        Branch(i % 2, rng.integers(5, 64, 9).astype(np.int32), np.zeros(9, np.float32), "ok", i < 2)
        for i in range(branches)
    ]
    return ReasoningTree(Trunk("tree", encoded, (prompt, prompt + 4, prompt + 8)), tuple(made))


def shapes_of(config: ModelConfig) -> dict:
    return flatten(param_shapes(config))


def packed(one: ReasoningTree):
    """One branch per row, and a trunk that fills its rows: no token is padding."""
    row, count = len(one.branches[0].tokens) - 1, len(one.branches)
    trunk = len(one.trunk.encoded.tokens)
    pack = PackConfig((trunk,), (len(one.trunk.path),), (trunk // row + count,), row, (count,), (row + 1,))
    batch, counters = pack_trees([one], pack)
    assert counters["tokens"] == counters["executed_tokens"]
    return batch


def traced(config: ModelConfig, one: ReasoningTree, trained: set[str], *, remat: bool, grad: bool) -> int:
    """What the library's own forward or gradient multiplies, padding and masked pairs included."""
    batch = packed(one)
    graphdef, shapes = graph_definition(config), shapes_of(config)

    def loss(moving, frozen):
        model = nnx.merge(graphdef, unflatten(moving | frozen))
        path, branch = tree_logprobs(model, batch, remat="full" if remat else "none", chunk=CHUNK)
        return jnp.sum(path) + jnp.sum(branch)

    moving = {k: x for k, x in shapes.items() if k in trained}
    frozen = {k: x for k, x in shapes.items() if k not in trained}
    return count(jax.make_jaxpr(jax.grad(loss) if grad else loss)(moving, frozen).jaxpr)


def executed(config: ModelConfig, one: ReasoningTree, work: flops.Flops, chunk: int = CHUNK) -> flops.Flops:
    """`work` with the pairs that dense attention multiplies for nothing and the padding of the last chunk of logits."""
    size = TreeSize.of(one, config.vision)
    trunk, rows, row = size.trunk, len(size.branches), size.branches[0][1] - 1
    unique = trunk * (trunk + 1) // 2 + sum((n - 1) * seen + n * (n - 1) // 2 for seen, n in size.branches)
    dense = (trunk + rows * row) * (trunk + row)
    logits = size.path + rows + rows * row
    padded = trunk + rows + rows * row  # as many as there is room for; a prompt's are not scored
    padded += -padded % -(-padded // -(-padded // chunk))
    # `count` takes the costlier branch, attention to the whole image, for every vision layer.
    vision = config.vision
    surplus = 4 * vision.hidden_size * 2 * (size.image_pairs - size.window_pairs)
    return flops.Flops(
        work.decoder, work.attention * dense / unique, work.vision + surplus, work.head * padded / logits
    )


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_the_forward_pass_multiplies_what_the_formula_says(config):
    one = tree()
    work = flops.forward_flops(config, shapes_of(config), TreeSize.of(one, VISION))
    assert executed(config, one, work).total == traced(config, one, set(), remat=False, grad=False)


def test_a_path_that_is_read_again_is_counted_as_a_trunk_of_its_own():
    """The path up to the key step, whose last token is predicted and not read."""
    one, pack = tree(), PackConfig((40,), (40,), (12,), 8, (8,), (9,), extras=("key_lengths", "key_slots"), key_step=2)
    size, plain = TreeSize.of(one, VISION, pack), TreeSize.of(one, VISION)
    begin, end = one.trunk.step(2)
    alone = TreeSize(end - 1 - one.trunk.ends[0], end - begin)
    of = functools.partial(flops.forward_flops, UNTIED, shapes_of(UNTIED))
    assert of(size) == of(plain) + of(alone)
    read = [pack_trees([one], p)[1]["tokens"] for p in (pack, dataclasses.replace(pack, extras=()))]
    assert read[0] - read[1] == alone.trunk


def selection(config: ModelConfig, kind: str) -> set[str]:
    paths = set(shapes_of(config))
    return {
        "all": paths,
        "decoder": {p for p in paths if not p.startswith("vision/")},
        "queries": {"layers/attention/q/kernel"},
        "head": {"head" if "head" in paths else "embed"},
        "last norm": {"norm/scale"},
    }[kind]


@pytest.mark.parametrize("kind", ["decoder", "queries", "head", "last norm"])
def test_the_gradient_multiplies_what_the_formula_says(kind):
    """Without recomputation, save for the logits."""
    one, trained = tree(patches=0), selection(UNTIED, kind)
    work = flops.update_flops(UNTIED, shapes_of(UNTIED), trained, TreeSize.of(one, VISION), remat=False)
    formula = sum(executed(UNTIED, one, part).total for part in work)
    counted = traced(UNTIED, one, trained, remat=False, grad=True)
    needless = 0.0
    if kind == "queries":  # nothing lies below them in the first layer: keys, values and input have no gradient
        needless = 2 * shapes_of(UNTIED)["layers/attention/q/kernel"].size / 3 * (40 + 32)
    assert counted <= formula
    assert counted == pytest.approx(formula, rel=0.02 if needless else 1e-9, abs=2 * needless)


def test_recomputing_layers_adds_one_forward_pass_of_them():
    one, trained = tree(patches=0), selection(UNTIED, "decoder")
    size = TreeSize.of(one, VISION)
    plain, again = (
        flops.update_flops(UNTIED, shapes_of(UNTIED), trained, size, remat=remat).recompute for remat in (False, True)
    )
    assert again.decoder == flops.forward_flops(UNTIED, shapes_of(UNTIED), size).decoder
    assert plain.decoder == 0
    assert plain.head == again.head > 0  # the logits are always recomputed
    extra = traced(UNTIED, one, trained, remat=True, grad=True) - traced(UNTIED, one, trained, remat=False, grad=True)
    formula = executed(UNTIED, one, again).total - executed(UNTIED, one, plain).total
    # XLA and JAX drop the recomputed output projections whose results nobody reads: at most two of seven matrices.
    assert 0.7 * formula <= extra <= formula


def test_a_compiled_layer_agrees_with_xlas_own_count():
    """One layer of each kind, so that the body that XLA counts once runs once; its count includes norms and softmax."""
    text = dataclasses.replace(
        TEXT, num_layers=1, hidden_size=128, intermediate_size=512, head_dim=32, mrope_section=(8, 4, 4)
    )
    vision = dataclasses.replace(VISION, depth=1, hidden_size=128, intermediate_size=256, out_hidden_size=128)
    vision = dataclasses.replace(vision, fullatt_block_indexes=(0,))
    config = ModelConfig(text, vision, 1, 2, 3, 4)
    one = tree()
    batch = packed(one)

    def forward(params):
        return tree_logprobs(nnx.merge(graph_definition(config), params), batch, chunk=1024)

    xla = jax.jit(forward).lower(param_shapes(config)).compile().cost_analysis()["flops"]
    work = flops.forward_flops(config, shapes_of(config), TreeSize.of(one, vision))
    ours = executed(config, one, work, chunk=1024).total
    assert ours == pytest.approx(xla, rel=0.06)


def test_tree_zero_of_the_3b_by_hand():
    """Prompt 1200, six steps of 60, reply 60, 24 branches of 256 over a decoder without image."""
    text = TextConfig(151_936, 2048, 11_008, 36, 16, 2, 128, 1e6, (16, 24, 24), 1e-6, True, 128_000)
    config = ModelConfig(text, dataclasses.replace(VISION, out_hidden_size=2048), 1, 2, 3, 4)
    size = TreeSize(1620, 420, tuple((1200 + 60 * i, 256) for i in range(6) for _ in range(4)))
    work = flops.forward_flops(config, shapes_of(config), size)
    layer = 2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 11_008
    assert work.decoder == 2 * 36 * layer * (1620 + 24 * 255)
    assert work.head == 2 * 151_936 * 2048 * (420 + 24 * 256)
    own = 24 * (255 * 1350 + 256 * 255 // 2)
    assert work.attention == 4 * 36 * 2048 * (1620 * 1621 // 2 + own)
    adapters = shapes_of(config) | {
        f"layers/attention/{name}/lora_{side}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, out in (("q", 2048), ("v", 256))
        for side, shape in (("a", (36, 2048, 8)), ("b", (36, 8, out)))
    }
    lora = flops.update_flops(config, adapters, [p for p in adapters if "lora" in p], size)
    small = 2 * 36 * 8 * (2048 + 2048 + 2048 + 256) * (1620 + 24 * 255)
    assert lora.forward.decoder == work.decoder + small
    assert lora.backward.decoder == pytest.approx(work.decoder + 2 * small)
    assert lora.backward.vision == 0


def test_exploration_is_bound_by_what_it_must_read_or_multiply():
    config = UNTIED
    shapes = shapes_of(config)
    size = flops.matrices(shapes)
    chip = flops.Chip(flops=1e12, bandwidth=1.0, memory=1.0)  # reading takes all the time
    one = TreeSize(20, 0, ((10, 3), (20, 2)))
    steps = [(20, 2 * 1), (10, 1 * 2)]  # (trunk tokens still read, own tokens)
    expected = sum(2 * (size.decoder + size.head) + flops.kv_bytes(config) * (trunk + own) for trunk, own in steps)
    assert flops.exploration_bound(config, shapes, [one], chip) == pytest.approx(expected, rel=1e-6)
    assert flops.kv_bytes(config) == 2 * 3 * 2 * 8 * 2
    fast = flops.Chip(flops=1.0, bandwidth=1e30, memory=1.0)  # multiplying does
    work = flops.exploration_flops(config, shapes, one)
    assert flops.exploration_bound(config, shapes, [one], fast) == pytest.approx(work.total)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 30))
def test_more_trees_never_cost_less_and_share_the_weights(trunk, branches, length):
    shapes, chip = shapes_of(UNTIED), CHIPS["v5e"]
    one = TreeSize(trunk, 0, ((trunk, length),) * branches)
    single = flops.exploration_bound(UNTIED, shapes, [one], chip)
    double = flops.exploration_bound(UNTIED, shapes, [one, one], chip)
    assert single <= double <= 2 * single * (1 + 1e-9)
    assert flops.exploration_bound(UNTIED, shapes, [one], chip, chips=2) == pytest.approx(single / 2)


def test_sizes_of_a_real_tree_leave_padding_out():
    one = tree()
    assert one.trunk.encoded.vision is not None
    images = np.repeat(np.asarray([1, 0, 2, 0], np.int32), [10, 6, 12, 4])  # two windows of 16, partly padding
    vision = one.trunk.encoded.vision._replace(images=images)
    padded = dataclasses.replace(one.trunk, encoded=dataclasses.replace(one.trunk.encoded, vision=vision))
    size = TreeSize.of(ReasoningTree(padded, one.branches), VISION)
    assert (size.patches, size.window_pairs, size.image_pairs) == (22, 10**2 + 12**2, 10**2 + 12**2)
    assert (size.trunk, size.path, size.branches[0]) == (40, 12, (28, 9))
    drawn = dataclasses.replace(size, patches=0).with_image(16, VISION)
    assert (drawn.patches, drawn.window_pairs, drawn.image_pairs) == (64, 64 * 16, 64 * 64)


@pytest.mark.parametrize(("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e")])
def test_device_kinds_have_their_limits(kind, name):
    assert flops.chip_of(kind) is CHIPS[name]
    assert flops.chip_of("cpu") is None
