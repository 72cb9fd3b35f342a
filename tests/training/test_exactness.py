"""Promise: the packed tree has the loss and the gradients of the naive computation, which runs every
prompt + prefix + branch as a padded sequence of its own and loops over pairs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srpo_jax import losses, trees
from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample
from srpo_jax.inputs import Encoded, VisionInputs, batch_inputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.logprobs import token_logprobs
from srpo_jax.models.lora import LoraConfig, init_adapters
from srpo_jax.models.policy import Policy, graph_definition
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.sharding import flatten, unflatten

VOCAB, PATCH_DIM, WINDOW = 40, 3 * 2 * 4 * 4, 4  # 4-pixel patches, windows of 2 × 2 patches: one merged feature each
PROMPT, STEP, REPLY, STEPS, LONGEST, SEQUENCES, PAIRS = 9, 3, 4, 3, 10, 20, 256
PACK = trees.PackConfig(trunk=(24,), path=(16,), patches=(16,), rows=(15,), row=11, branches=(20,), branch=(LONGEST,))
LAMBDA = 0.7


def config() -> ModelConfig:
    text = TextConfig(VOCAB, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, False, 64)
    vision = VisionConfig(2, 8, 12, 2, 3, 4, 2, 2, 8, (1,), 16)
    return ModelConfig(text, vision, 1, 2, 3, 4, {})


@functools.cache
def model_parts(dtype: str):
    with precision(dtype):
        graphdef, state = nnx.split(Qwen2_5_VL(config(), nnx.Rngs(0)))
        leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(state))
        rng = np.random.default_rng(0)
        leaves = [jnp.asarray(rng.normal(scale=0.3, size=x.shape) + (x.ndim == 1), dtype) for x in leaves]
        return graphdef, jax.tree.unflatten(treedef, leaves)


def precision(dtype: str):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def make_trunk(rng: np.random.Generator, images: int) -> trees.Trunk:
    """A trunk with `images` images of two features each, at positions 1, 2 and 4, 5 of the prompt."""
    length = PROMPT + STEPS * STEP + REPLY
    slots = np.full(length, -1, np.int32)
    slots[[1, 2, 4, 5][: 2 * images]] = np.arange(2 * images)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
    positions[1, 1:6], positions[2, 2:6] = 1, 3  # any ids do, as long as text follows the largest
    count = 2 * images * WINDOW
    vision = VisionInputs(
        patches=rng.normal(size=(count, PATCH_DIM)).astype(np.float32),
        positions=rng.integers(0, 4, (count, 2)).astype(np.int32),
        images=np.repeat(np.arange(1, images + 1, dtype=np.int32), 2 * WINDOW),
    )
    tokens = rng.integers(5, VOCAB, length).astype(np.int32)
    encoded = Encoded(tokens, positions, slots, vision if images else None)
    return trees.Trunk("r", encoded, tuple(PROMPT + STEP * i for i in range(STEPS + 1)))


@st.composite
def random_tree(draw, max_length: int = LONGEST) -> trees.ReasoningTree:
    """One to two images, any branches: one-sided prefixes, identical branches, branches of one token, unknown verdicts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trunk = make_trunk(rng, draw(st.integers(1, 2)))
    branches = []
    for prefix in trunk.prefixes:
        for _ in range(draw(st.integers(0, 5))):
            n = draw(st.integers(1, max_length))
            tokens = rng.integers(5, VOCAB, n).astype(np.int32)
            verdict = draw(st.sampled_from([True, False, None]))
            branches.append(trees.Branch(prefix, tokens, np.zeros(n, np.float32), "ok", verdict))
            if draw(st.booleans()) and len(branches) < SEQUENCES - 1:
                branches.append(branches[-1])
    return trees.ReasoningTree(trunk, tuple(branches[:SEQUENCES]))


def packed_loss(params, graphdef, batch: trees.TreeBatch, **options):
    path, branch = tree_logprobs(nnx.merge(graphdef, params), batch, remat="full", chunk=16)
    data = losses.BranchLogprobs(branch, batch.lengths, batch.prefixes, batch.pairs, batch.tokens)
    loss, aux = losses.srpo(
        path, batch.path_lengths, data, lambda_=LAMBDA, prefix_lengths=batch.prefix_lengths, **options
    )
    return jnp.sum(loss * batch.weight) / jnp.sum(batch.weight), aux


def sequence_logprobs(params, graphdef, inputs):
    """log π(token t | tokens before) of whole padded sequences, [n, T]; position 0 is meaningless."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    scores = token_logprobs(hidden[:, :-1], model.output_embedding, jnp.asarray(inputs.tokens)[:, 1:])
    return jnp.pad(scores, ((0, 0), (1, 0)))


def naive_loss(scores, plan):
    """The formula from the log-probs of whole sequences: every mean is over a span (sequence, start, end) of `plan`."""

    def mean(span):
        token = jnp.arange(scores.shape[1])
        inside = (token >= span[1]) & (token < span[2])
        return jnp.sum(jnp.where(inside, scores[span[0]], 0.0)) / jnp.maximum(span[2] - span[1], 1)

    reference = -jnp.mean(jax.vmap(mean)(plan["references"]))
    plus, minus = (jnp.minimum(jax.vmap(mean)(plan[side]), -1e-4) for side in ("plus", "minus"))
    gap = (plus - jnp.log1p(-jnp.exp(plus))) - (minus - jnp.log1p(-jnp.exp(minus)))
    ell = jnp.where(plan["weight"] > 0, jnp.log1p(jnp.exp(-gap)), 0.0)
    return reference + LAMBDA * jnp.sum(plan["weight"] * ell)


def span_plan(questions):
    """Arrays of fixed size: reference spans, and every pair's two spans with 1 / (questions × prefixes × pairs)."""
    pairs = []
    for _, by_prefix in questions:
        filled = [p for p in by_prefix if p]
        pairs += [(a, b, 1 / (len(questions) * len(filled) * len(p))) for p in filled for a, b in p]
    missing = PAIRS - len(pairs)
    assert missing >= 0
    pairs += [((0, 1, 2), (0, 1, 2), 0.0)] * missing
    return {
        "references": np.asarray([reference for reference, _ in questions]),
        "plus": np.asarray([a for a, _, _ in pairs]),
        "minus": np.asarray([b for _, b, _ in pairs]),
        "weight": np.asarray([w for _, _, w in pairs]),
    }


def naive_plan(batch_trees, total):
    """Every sequence on its own, and which of them form the pairs of each question and prefix."""
    examples, plan = [], []
    for tree in batch_trees:
        trunk = tree.trunk
        trunk_row = len(examples)
        examples.append(trunk.encoded)
        seen: dict = {}
        for branch in tree.branches:
            key = branch.prefix, tuple(branch.tokens.tolist())
            seen.setdefault(key, set()).add(branch.verdict)
        spans = {}
        for prefix, tokens in seen:
            end = trunk.ends[prefix]
            head = trunk.encoded.prefix(end)
            spans[prefix, tokens] = len(examples), end, end + len(tokens)
            examples.append(head.append(tokens))
        pairs_by_prefix = []
        for prefix in trunk.prefixes:
            of = {
                v: [spans[k] for k, seen_v in seen.items() if k[0] == prefix and seen_v == {v}] for v in (True, False)
            }
            pairs_by_prefix.append([(a, b) for a in of[True] for b in of[False]])
        plan.append(((trunk_row, trunk.ends[0], len(trunk.encoded.tokens)), pairs_by_prefix))
    examples += [examples[0]] * (total - len(examples))
    return batch_inputs(examples, PACK.trunk[0] + LONGEST, PACK.patches[0]), plan


def leaves(tree) -> dict[str, np.ndarray]:
    """Gradients by path, in numpy: norms taken outside jit and x64 would silently be float32."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def both(dtype: str, batch_trees, params=None):
    with precision(dtype):
        graphdef, usual = model_parts(dtype)
        params = usual if params is None else params
        batch, _ = trees.pack_trees(batch_trees, PACK)
        inputs, plan = naive_plan(batch_trees, len(batch_trees) * (SEQUENCES + 1))
        (ours, aux), grads = compiled_packed(graphdef)(params, batch)
        theirs, expected = compiled_naive(graphdef)(params, inputs, span_plan(plan))
        return ours, grads, theirs, expected, aux


@functools.cache
def compiled_packed(graphdef):
    return jax.jit(jax.value_and_grad(lambda p, b: packed_loss(p, graphdef, b), has_aux=True))


@functools.cache
def compiled_naive(graphdef):
    return jax.jit(jax.value_and_grad(lambda p, inputs, plan: naive_loss(sequence_logprobs(p, graphdef, inputs), plan)))


RELAXED = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@RELAXED
@given(st.lists(random_tree(), min_size=2, max_size=2))
def test_loss_and_every_gradient_equal_the_naive_computation_in_float64(batch_trees):
    ours, grads, theirs, expected, _ = both("float64", batch_trees)
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    assert_equal_leaves(grads, expected)


def assert_equal_leaves(grads, expected, bound=1e-9):
    ours_flat, theirs_flat = leaves(grads), leaves(expected)
    scale = max(np.linalg.norm(g) for g in theirs_flat.values())
    for name, wanted in theirs_flat.items():
        assert wanted.dtype == np.float64
        size = max(np.linalg.norm(wanted), 1e-6 * scale)  # a leaf that is all rounding has no relative error
        assert np.linalg.norm(ours_flat[name] - wanted) <= bound * size, name


@RELAXED
@given(st.lists(random_tree(), min_size=2, max_size=2))
def test_gradients_in_float32_stay_within_1e_5_of_the_global_norm(batch_trees):
    ours, grads, theirs, expected, aux = both("float32", batch_trees)
    assert float(jnp.max(aux["m_favourable"] * aux["has_pairs"])) <= 0.0
    assert ours == pytest.approx(float(theirs), rel=1e-5)
    ours_flat, theirs_flat = leaves(grads), leaves(expected)
    norm = np.sqrt(sum(np.sum(g**2) for g in theirs_flat.values()))
    gap = np.sqrt(sum(np.sum((ours_flat[name] - g) ** 2) for name, g in theirs_flat.items()))
    assert gap / norm <= 1e-5


def test_adapters_get_the_gradients_of_the_naive_computation_in_float64():
    """On a frozen base, of the vision tower and of the decoder."""
    rng = np.random.default_rng(6)
    batch_trees = []
    for images in (1, 2):
        trunk = make_trunk(rng, images)
        verdicts = [(i, v) for i in trunk.prefixes for v in (True, False, True)]
        lengths = rng.integers(1, LONGEST + 1, len(verdicts))
        tokens = [rng.integers(5, VOCAB, n).astype(np.int32) for n in lengths]
        branches = [
            trees.Branch(i, t, np.zeros(len(t), np.float32), "ok", v)
            for (i, v), t in zip(verdicts, tokens, strict=True)
        ]
        batch_trees.append(trees.ReasoningTree(trunk, tuple(branches)))
    with precision("float64"):
        _, base = model_parts("float64")
        made = init_adapters(base, LoraConfig(2, targets=("layers/attention/(q|v)", "vision/blocks/mlp/up")), 0)
        adapters = {path: x.astype(jnp.float64) for path, x in made.items() if not path.endswith("scale")}
        adapters = {path: jnp.asarray(rng.normal(scale=0.3, size=x.shape)) for path, x in adapters.items()}
        frozen = flatten(base) | {path: x for path, x in made.items() if path not in adapters}
        graphdef = graph_definition(config(), unflatten(frozen | adapters))
        batch, _ = trees.pack_trees(batch_trees, PACK)
        inputs, plan = naive_plan(batch_trees, len(batch_trees) * (SEQUENCES + 1))

        def packed(adapters):
            return packed_loss(unflatten(frozen | adapters), graphdef, batch)[0]

        def naive(adapters):
            return naive_loss(sequence_logprobs(unflatten(frozen | adapters), graphdef, inputs), span_plan(plan))

        ours, grads = jax.jit(jax.value_and_grad(packed))(adapters)
        theirs, expected = jax.jit(jax.value_and_grad(naive))(adapters)
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    assert min(np.abs(x).max() for x in leaves(expected).values()) > 0
    assert_equal_leaves(grads, expected)


def test_a_policy_that_is_sure_of_its_tokens_has_exact_gradients_too():
    """m near 0, where log-odds are steepest: half of the branches are greedy under a sharpened head."""
    rng = np.random.default_rng(5)
    trunk = make_trunk(rng, 2)
    with precision("float64"):
        graphdef, params = model_parts("float64")
        params = params | {"head": params["head"] * 600}
        limits = np.asarray(trunk.ends[:-1], np.int32)
        greedy = SampleConfig(LONGEST, (-1,), temperature=0.0, loop_tokens=0)
        request = Request(trunk.encoded, limits, np.arange(3, dtype=np.int32), jax.random.split(jax.random.key(0), 3))
        pack = prefill_shape(1, PACK.trunk[0], trunk.encoded.patches, config().vision)
        shape = EngineShape(trees=1, width=3, branches=3, prefixes=3, pack=pack)
        [(_, samples)] = sample(Policy(config(), graphdef, params, None), params, [request], shape, greedy)
        sure = samples.tokens
    m = np.mean(samples.logprobs, axis=-1)
    assert (m > -0.02).any()
    branches = [trees.Branch(i, t, np.zeros(LONGEST, np.float32), "ok", bool(i % 2)) for i, t in enumerate(sure)]
    for i in trunk.prefixes:
        tokens = sure[i].copy()
        tokens[-1] = rng.integers(5, VOCAB)
        branches.append(trees.Branch(i, tokens, np.zeros(LONGEST, np.float32), "ok", not i % 2))
    tree = trees.ReasoningTree(trunk, tuple(branches))
    ours, grads, theirs, expected, aux = both("float64", [tree, tree], params)
    assert float(aux["pairs"][0]) == 3
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    assert_equal_leaves(grads, expected)


def test_the_check_sees_a_branch_that_reads_one_trunk_token_too_many():
    rng = np.random.default_rng(3)
    trunk = make_trunk(rng, 1)
    branches = tuple(
        trees.Branch(i, rng.integers(5, VOCAB, 6).astype(np.int32), np.zeros(6, np.float32), "ok", v)
        for i in trunk.prefixes
        for v in (True, False)
    )
    tree = trees.ReasoningTree(trunk, branches)
    with precision("float64"):
        graphdef, params = model_parts("float64")
        batch, _ = trees.pack_trees([tree, tree], PACK)
        wrong = batch._replace(rows=batch.rows._replace(limits=batch.rows.limits + (batch.rows.limits > 0)))
        right_loss = compiled_packed(graphdef)(params, batch)[0][0]
        wrong_loss = compiled_packed(graphdef)(params, wrong)[0][0]
    assert abs(float(right_loss - wrong_loss)) > 1e-5


def test_a_padding_tree_changes_nothing():
    rng = np.random.default_rng(4)
    trunk = make_trunk(rng, 2)
    branches = tuple(
        trees.Branch(1, rng.integers(5, VOCAB, 5).astype(np.int32), np.zeros(5, np.float32), "ok", v)
        for v in (True, False)
    )
    tree = trees.ReasoningTree(trunk, branches)
    with precision("float64"):
        graphdef, params = model_parts("float64")
        (loss, _), grads = compiled_packed(graphdef)(params, trees.pack_trees([tree, tree], PACK)[0])
        (padded, _), padded_grads = compiled_packed(graphdef)(params, trees.pack_trees([tree], PACK, size=2)[0])
    assert float(loss) == pytest.approx(float(padded), rel=1e-12)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(padded_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)
