"""Promises of the sampler: its log-probs are the trainer's, a branch depends on its key alone, greedy is greedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srpo_jax import trees
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key, sample_branches
from srpo_jax.inputs import Encoded, VisionInputs, batch_inputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.logprobs import head_logits
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.models.scoring import tree_logprobs

VOCAB, T, BUDGET, EOS, ENDS = 50, 20, 12, 3, (8, 11, 14, 17)
PACK = trees.PackConfig(trunk=(T,), path=(T,), rows=(16,), row=BUDGET, branches=(9,), branch=(BUDGET,))
SAMPLED = SampleConfig(BUDGET, EOS)


@pytest.fixture(scope="module")
def policy():
    text = TextConfig(VOCAB, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, True, 64)
    vision = VisionConfig(2, 8, 12, 2, 3, 4, 2, 2, 8, (1,), 16)
    graphdef, state = nnx.split(Qwen2_5_VL(ModelConfig(text, vision, 1, 2, 3, 4, {}), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32), nnx.to_pure_dict(state)
    )


def make_trunk(seed: int) -> trees.Trunk:
    rng = np.random.default_rng(seed)
    slots = np.full(T, -1, np.int32)
    slots[[2, 3]] = [0, 1]
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)).copy()
    vision = VisionInputs(
        rng.normal(size=(8, 96)).astype(np.float32), rng.integers(0, 4, (8, 2)).astype(np.int32), np.ones(8, np.int32)
    )
    tokens = rng.integers(4, VOCAB, T).astype(np.int32)
    return trees.Trunk(f"record-{seed}", Encoded(tokens, positions, slots, vision), ENDS)


def sample(policy, trunks, config=SAMPLED, key=None):
    key = jax.random.key(7) if key is None else key
    prefixes = np.repeat(np.arange(3), 3)
    limits = np.broadcast_to(np.asarray(ENDS)[prefixes], (len(trunks), 9)).astype(np.int32)
    records = jnp.stack([record_key(key, t.record_id) for t in trunks])
    numbers = np.broadcast_to(np.arange(9) % 3, limits.shape)
    keys = branch_keys(records, jnp.broadcast_to(prefixes, limits.shape), numbers)
    inputs = batch_inputs([t.encoded for t in trunks], T)
    return jax.device_get(sample_branches(*policy, inputs, limits, keys, config)), prefixes


def as_trees(trunks, samples, prefixes):
    return [
        trees.ReasoningTree(
            trunk,
            tuple(
                trees.Branch(
                    int(i),
                    samples.tokens[row, m, : samples.lengths[row, m]],
                    samples.logprobs[row, m],
                    "ok",
                    bool(m % 2),
                )
                for m, i in enumerate(prefixes)
            ),
        )
        for row, trunk in enumerate(trunks)
    ]


def test_logprobs_of_the_sampler_are_those_of_the_trainer(policy):
    graphdef, params = policy
    trunks = [make_trunk(0), make_trunk(1)]
    samples, prefixes = sample(policy, trunks)
    assert samples.stopped.any()
    assert not samples.stopped.all()
    batch, counters = trees.pack_trees(as_trees(trunks, samples, prefixes), PACK)
    assert counters["merged"] == 0
    _, scored = jax.jit(lambda p, b: tree_logprobs(nnx.merge(graphdef, p), b))(params, batch)
    valid = np.arange(BUDGET) < samples.lengths[..., None]
    np.testing.assert_allclose(np.where(valid, scored, 0), np.where(valid, samples.logprobs, 0), atol=1e-5)


def test_a_branch_does_not_change_with_its_neighbours_or_its_row(policy):
    one, two, three = make_trunk(0), make_trunk(1), make_trunk(2)
    first, _ = sample(policy, [one, two])
    second, _ = sample(policy, [three, one])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[0], b[1])


def test_another_key_or_record_gives_other_branches(policy):
    first, _ = sample(policy, [make_trunk(0), make_trunk(0)])
    np.testing.assert_array_equal(first.tokens[0], first.tokens[1])
    second, _ = sample(policy, [make_trunk(0), make_trunk(0)], key=jax.random.key(8))
    assert (first.tokens != second.tokens).any(axis=-1).mean() > 0.9
    assert len({tuple(row) for row in first.tokens[0].tolist()}) == 9


def test_greedy_takes_the_best_token_and_stops_at_end_of_turn(policy):
    graphdef, params = policy
    trunk = make_trunk(0)
    samples, _ = sample(policy, [trunk, trunk], SampleConfig(BUDGET, EOS, temperature=0.0))
    tokens = samples.tokens[0, 0, : samples.lengths[0, 0]]
    head = trunk.encoded.prefix(ENDS[0])
    inputs = batch_inputs([head.append(tokens)], T)
    model = nnx.merge(graphdef, params)
    hidden, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    best = np.argmax(head_logits(hidden, model.output_embedding), axis=-1)[0]
    np.testing.assert_array_equal(best[ENDS[0] - 1 : ENDS[0] - 1 + len(tokens)], tokens)
    ended = samples.tokens[samples.stopped]
    last = np.take_along_axis(ended, samples.lengths[samples.stopped][:, None] - 1, axis=1)
    assert (last == EOS).all()


def test_sampling_follows_the_policy(policy):
    """First tokens of many branches at one prefix: their frequencies are the policy's probabilities (chi-squared)."""
    graphdef, params = policy
    trunk, count = make_trunk(0), 4000
    limits = np.full((1, count), ENDS[1], np.int32)
    keys = jax.random.split(jax.random.key(0), count)[None]
    inputs = batch_inputs([trunk.encoded], T)
    samples = sample_branches(graphdef, params, inputs, limits, keys, SampleConfig(1, EOS, temperature=2.0))
    model = nnx.merge(graphdef, params)
    hidden, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    expected = count * np.asarray(jax.nn.softmax(head_logits(hidden[0, ENDS[1] - 1], model.output_embedding) / 2.0))
    seen = np.bincount(np.asarray(samples.tokens).ravel(), minlength=VOCAB)
    common = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[common].sum()
    assert statistic < common.sum() + 4 * np.sqrt(2 * common.sum())
