"""Promises of the engine: the trainer's log-probs, a branch is a function of trunk, prefix and key, nothing runs twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax import trees
from srpo_jax.exploration import engine, scheduler
from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key
from srpo_jax.exploration.scheduler import Request
from srpo_jax.inputs import Encoded, PrefillShape, VisionInputs, batch_inputs, pack_inputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.geometry import empty_vision
from srpo_jax.models.logprobs import head_logits
from srpo_jax.models.policy import Policy
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.models.scoring import score_trees, tree_logprobs

VOCAB, T, BUDGET, EOS, ENDS = 50, 20, 12, 3, (8, 11, 14, 17)
PACK = trees.PackConfig(trunk=(T,), path=(T,), rows=(16,), row=BUDGET, branches=(9,), branch=(BUDGET,))
SAMPLED = SampleConfig(BUDGET, (EOS,))
SHAPE = EngineShape(trees=2, width=4, branches=9, prefixes=3, pack=PrefillShape(2, T, 2 * T - 5, 12, 24))
PREFIXES = np.repeat(np.arange(3), 3)


@pytest.fixture(scope="module")
def policy():
    text = TextConfig(VOCAB, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, True, 64)
    vision = VisionConfig(2, 8, 12, 2, 3, 4, 2, 2, 8, (1,), 16)
    config = ModelConfig(text, vision, 1, 2, 3, 4, {})
    graphdef, state = nnx.split(Qwen2_5_VL(config, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32), nnx.to_pure_dict(state)
    )
    return Policy(config, graphdef, params, None)


def make_trunk(seed: int) -> trees.Trunk:
    """Trunks of several lengths, with a picture of one or two windows or none."""
    rng = np.random.default_rng(seed)
    length, patches = T - seed % 3, (8, 4, 12, 0)[seed % 4]
    slots = np.full(length, -1, np.int32)
    slots[2 : 2 + patches // 4] = np.arange(patches // 4)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
    vision = None
    if patches:
        vision = VisionInputs(
            rng.normal(size=(patches, 96)).astype(np.float32),
            rng.integers(0, 4, (patches, 2)).astype(np.int32),
            np.ones(patches, np.int32),
        )
    tokens = rng.integers(4, VOCAB, length).astype(np.int32)
    return trees.Trunk(f"record-{seed}", Encoded(tokens, positions, slots, vision), ENDS)


def request(trunk, key, prefixes=PREFIXES):
    keys = branch_keys(record_key(key, trunk.record_id), prefixes, np.arange(len(prefixes)) % 3)
    return Request(trunk.encoded, np.asarray(ENDS[:3], np.int32), prefixes, keys)


def sample(policy, trunks, config=SAMPLED, key=None, shape=SHAPE):
    """Samples of every trunk, in order."""
    key = jax.random.key(7) if key is None else key
    found = dict(scheduler.sample(policy, policy.params, (request(t, key) for t in trunks), shape, config))
    return [found[i] for i in range(len(trunks))]


def as_tree(trunk, samples):
    made = zip(PREFIXES, samples.tokens, samples.logprobs, samples.lengths, strict=True)
    branches = (trees.Branch(int(i), t[:n], lp[:n], "ok", bool(m % 2)) for m, (i, t, lp, n) in enumerate(made))
    return trees.ReasoningTree(trunk, tuple(branches))


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture(scope="module")
def whole(policy):
    """Six trees through two places: (trunks, samples)."""
    trunks = [make_trunk(seed) for seed in range(6)]
    return trunks, sample(policy, trunks)


def test_logprobs_of_the_sampler_are_those_of_the_trainer(policy, whole):
    trunks, samples = whole
    stopped = np.concatenate([s.stopped for s in samples])
    assert stopped.any() and not stopped.all()
    scored = jax.jit(lambda p, b: tree_logprobs(nnx.merge(policy.graphdef, p), b)[1])
    for first in range(0, 6, 2):
        batch, counters = trees.pack_trees([as_tree(trunks[i], samples[i]) for i in (first, first + 1)], PACK)
        assert counters["merged"] == 0
        for ours, theirs in zip(samples[first : first + 2], scored(policy.params, batch), strict=True):
            valid = np.arange(BUDGET) < ours.lengths[:, None]
            np.testing.assert_allclose(np.where(valid, theirs, 0), np.where(valid, ours.logprobs, 0), atol=1e-5)


OTHER = trees.PackConfig(trunk=(32,), path=(T,), rows=(8,), row=32, branches=(12,), branch=(16,))


def gaps(policy, trunks, samples, pack, batch):
    """Differences of the log-probs of all tokens, when the same branches are scored in other shapes."""
    made = [as_tree(t, s) for t, s in zip(trunks, samples, strict=True)]
    scored = list(score_trees(policy.graphdef, policy.params, made, pack, batch))
    return np.concatenate(
        [
            ours - b.logprobs
            for t, row in zip(made, scored, strict=True)
            for b, ours in zip(t.branches, row, strict=True)
        ]
    )


def test_given_branches_are_scored_as_they_were_sampled_in_the_updates_shapes_and_in_others(policy, whole):
    """Verdicts do not matter, and a branch that occurs twice is scored twice."""
    trunks, samples = whole
    assert np.abs(gaps(policy, trunks, samples, PACK, 2)).max() <= 1e-5
    assert np.abs(gaps(policy, trunks, samples, OTHER, 4)).max() <= 1e-4
    tree = as_tree(trunks[0], samples[0])
    strange = (dataclasses.replace(tree.branches[0], status="judge_failed", verdict=None), *tree.branches)
    [scores] = score_trees(policy.graphdef, policy.params, [dataclasses.replace(tree, branches=strange)], OTHER, 4)
    np.testing.assert_array_equal(scores[0], scores[1])
    assert len(scores) == len(strange)


def test_in_bfloat16_sampler_and_trainer_agree_on_average(policy, whole):
    """The keys of a CPU are kept in float32 there, which changes nothing but the time."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy.params)
    policy = dataclasses.replace(policy, params=rounded)
    trunks = whole[0]
    samples = sample(policy, trunks)
    state = engine.start(policy.graphdef, rounded, SHAPE, SAMPLED, None)
    assert {x.dtype for x in jax.tree.leaves(state.cache)} == {jnp.dtype("float32")}
    assert np.abs(gaps(policy, trunks, samples, PACK, 2)).mean() <= 1e-3
    exact = dataclasses.replace(policy, params=jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert np.abs(gaps(exact, trunks, samples, PACK, 2)).mean() > 1e-3  # what rounding does where it is not the same


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_branch_is_bit_for_bit_the_same_in_every_place_beside_every_neighbour(policy, whole, order, count):
    """Another order and another set of trees: other places, other packs, other starting times."""
    trunks, samples = whole
    chosen = order[:count]
    assert_same(sample(policy, [trunks[i] for i in chosen]), [samples[i] for i in chosen])


def test_branches_are_the_same_at_any_width_to_rounding(policy, whole):
    trunks, samples = whole
    for shape in (dataclasses.replace(SHAPE, width=9), dataclasses.replace(SHAPE, trees=3, width=1)):
        for ours, theirs in zip(sample(policy, trunks, shape=shape), samples, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_another_key_or_record_gives_other_branches(policy, whole):
    trunks, samples = whole
    other = sample(policy, trunks, key=jax.random.key(8))
    first = np.concatenate([s.tokens for s in samples])
    assert (first != np.concatenate([s.tokens for s in other])).any(axis=-1).mean() > 0.9
    assert len({tuple(row) for row in first.tolist()}) == len(first)


def test_greedy_takes_the_best_token_and_stops_at_end_of_turn(policy):
    trunk = make_trunk(0)
    [samples] = sample(policy, [trunk], dataclasses.replace(SAMPLED, temperature=0.0))
    tokens = samples.tokens[0, : samples.lengths[0]]
    inputs = batch_inputs([trunk.encoded.prefix(ENDS[0]).append(tokens)], T)
    model = nnx.merge(policy.graphdef, policy.params)
    hidden, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    best = np.argmax(head_logits(hidden, model.output_embedding), axis=-1)[0]
    np.testing.assert_array_equal(best[ENDS[0] - 1 : ENDS[0] - 1 + len(tokens)], tokens)
    last = np.take_along_axis(samples.tokens, samples.lengths[:, None] - 1, axis=1)[:, 0]
    np.testing.assert_array_equal(samples.stopped, last == EOS)


def test_every_stop_token_ends_a_turn(policy, whole):
    trunks, samples = whole
    second = int(samples[0].tokens[0, 2])
    [ours] = sample(policy, trunks[:1], dataclasses.replace(SAMPLED, stop_ids=(EOS, second)))
    for tokens, n, stopped, before in zip(ours.tokens, ours.lengths, ours.stopped, samples[0].tokens, strict=True):
        hits = np.flatnonzero(np.isin(before, (EOS, second)))
        assert n == (hits[0] + 1 if len(hits) else BUDGET) and stopped == bool(len(hits))
        np.testing.assert_array_equal(tokens[:n], before[:n])


def test_sampling_follows_the_policy(policy):
    """First tokens of many branches at one prefix: their frequencies are the policy's probabilities (chi-squared)."""
    trunk, count = make_trunk(0), 4000
    shape = EngineShape(1, 500, count, 1, SHAPE.pack)
    keys = jax.random.split(jax.random.key(0), count)
    wanted = [Request(trunk.encoded, np.asarray([ENDS[1]]), np.zeros(count, np.int32), keys)]
    [(_, samples)] = scheduler.sample(policy, policy.params, wanted, shape, SampleConfig(1, (EOS,), temperature=2.0))
    inputs = batch_inputs([trunk.encoded], T)
    model = nnx.merge(policy.graphdef, policy.params)
    hidden, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    expected = count * np.asarray(jax.nn.softmax(head_logits(hidden[0, ENDS[1] - 1], model.output_embedding) / 2.0))
    seen = np.bincount(samples.tokens.ravel(), minlength=VOCAB)
    common = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[common].sum()
    assert statistic < common.sum() + 4 * np.sqrt(2 * common.sum())


def test_packed_trunks_are_bit_for_bit_independent_and_equal_padded_ones(policy):
    trunks = [make_trunk(seed).encoded.prefix(17) for seed in (1, 3)]
    prefill = jax.jit(lambda packed: nnx.merge(policy.graphdef, policy.params).prefill(packed))
    nothing = empty_vision(policy.config.vision)
    hidden, kv = prefill(pack_inputs(trunks, SHAPE.pack, nothing))
    other, other_kv = prefill(pack_inputs(trunks[::-1], SHAPE.pack, nothing))
    np.testing.assert_array_equal(hidden[:17], other[17:34])
    np.testing.assert_array_equal(hidden[17:34], other[:17])
    for a, b in zip(kv, other_kv, strict=True):
        np.testing.assert_array_equal(a[:, 0, :17], b[:, 1, :17])
    model, inputs = nnx.merge(policy.graphdef, policy.params), batch_inputs(trunks, 17)
    padded, padded_kv = model.trunk(inputs, model.encode_images(inputs.vision), keep_kv=True)
    np.testing.assert_allclose(hidden[:34].reshape(2, 17, -1), padded, atol=2e-5)
    for a, b in zip(kv, padded_kv, strict=True):
        np.testing.assert_allclose(a[:, :, :17], b, atol=2e-5)


def test_an_image_is_encoded_once_and_a_trunk_prefilled_once(policy, monkeypatch):
    """A prefill is one pass through tower and decoder; every trunk is in one pack; decoding runs the decoder alone."""
    packs = []
    inner = engine.prefill

    def prefill(graphdef, params, state, pack, *args):
        packs.append(pack)
        return inner(graphdef, params, state, pack, *args)

    monkeypatch.setattr(scheduler, "prefill", prefill)
    trunks = [make_trunk(seed) for seed in range(6)]
    sample(policy, trunks)
    assert sum(int((pack.lengths > 0).sum()) for pack in packs) == len(trunks)
    assert sum(int((pack.vision.images > 0).sum()) for pack in packs) == sum(t.encoded.patches for t in trunks)
    depth, layers = policy.config.vision.depth, policy.config.text.num_layers
    assert depth == layers == 2
    state = engine.start(policy.graphdef, policy.params, SHAPE, SAMPLED, None)
    new = scheduler._trees([], SHAPE)
    grouped = jax.tree.map(lambda x: np.asarray(x)[None], (packs[0], new, np.zeros(2, np.int32)))
    grouped = (jax.tree.map(lambda x: x[0], grouped[0]), *grouped[1:])
    program = jax.make_jaxpr(lambda p, s, *a: inner(policy.graphdef, p, s, *a, None))(policy.params, state, *grouped)
    assert scans(program.jaxpr) == [depth, layers]
    program = jax.make_jaxpr(
        lambda p, s: engine.decode(policy.graphdef, p, s, np.zeros(2, np.float32), SAMPLED, None, 64)
    )(policy.params, state)
    assert scans(program.jaxpr) == [layers]


def scans(jaxpr) -> list[int]:
    """Lengths of the loops over layers in a program, its inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn.params["length"]] if eqn.primitive.name == "scan" else []
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                part = getattr(part, "jaxpr", part)
                found += scans(part) if hasattr(part, "eqns") else []
    return found


def test_the_same_programs_serve_every_mixture(policy, whole):
    """Nothing is compiled for trees of other lengths, images, prefixes or numbers of branches, nor for more trees."""
    programs = lambda: [f._cache_size() for f in (engine.start, engine.prefill, engine.decode)]  # noqa: E731
    before = programs()
    rng = np.random.default_rng(0)
    for _ in range(10):
        wanted = [
            request(make_trunk(int(seed)), jax.random.key(1), np.sort(rng.choice(3, rng.integers(1, 10))))
            for seed in rng.integers(0, 10_000, rng.integers(1, 4))
        ]
        assert len(list(scheduler.sample(policy, policy.params, wanted, SHAPE, SAMPLED))) == len(wanted)
    assert programs() == before


def test_int8_keys_and_values_move_logprobs_by_little(policy, whole):
    """Teacher forcing through greedy branches; 8 bits of each vector's largest entry leave about three digits."""
    trunks, _ = whole
    greedy = dataclasses.replace(SAMPLED, temperature=0.0)
    exact = sample(policy, trunks, greedy)
    rounded = sample(policy, trunks, greedy, shape=dataclasses.replace(SHAPE, int8=True))
    gaps = []
    for a, b in zip(exact, rounded, strict=True):
        same = np.cumprod(a.tokens == b.tokens, axis=1) * (np.arange(BUDGET) < a.lengths[:, None])
        gaps.append(np.abs(a.logprobs - b.logprobs)[same.astype(bool)])
    gaps = np.concatenate(gaps)
    assert len(gaps) > 100
    assert 1e-6 < gaps.mean() < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"trunk": T}, "trunk tokens exceed"), ({"prefixes": 10}, "branches exceed"), ({"limits": 4}, "prefixes exceed")],
)
def test_a_request_that_does_not_fit_is_refused(policy, change, message):
    one = request(make_trunk(0), jax.random.key(0))
    if "trunk" in change:
        one = dataclasses.replace(one, trunk=one.trunk.append(np.ones(9, np.int32)), limits=np.asarray([8, 11, 25]))
    elif "prefixes" in change:
        one = dataclasses.replace(one, prefixes=np.zeros(10, np.int32))
    else:
        one = dataclasses.replace(one, limits=np.asarray([8, 11, 14, 17]))
    with pytest.raises(ValueError, match=f"request 1: .*{message}"):
        list(scheduler.sample(policy, policy.params, [request(make_trunk(1), jax.random.key(0)), one], SHAPE, SAMPLED))
