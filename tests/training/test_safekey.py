"""Promises of SafeKey's terms in an update: the loss and gradients of a separate forward pass in which the query is hidden,
and the very program of before where they have no weight."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srpo_jax import trees
from srpo_jax.inputs import batch_inputs
from srpo_jax.models import attention
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.step import ComputeConfig, tree_loss
from tests.training.test_exactness import (
    PACK,
    PROMPT,
    STEP,
    STEPS,
    VOCAB,
    assert_equal_leaves,
    make_trunk,
    model_parts,
    precision,
    sequence_logprobs,
)

KEY = 0.3
KEYED = dataclasses.replace(PACK, extras=("key_lengths", "key_slots"), key_step=STEPS)
SHORT = dataclasses.replace(KEYED, row=5, rows=(16,))  # the path is longer than a row
COMPUTE = ComputeConfig(dtype="float64", remat="none")
causal_mask = attention.causal_mask


def two_trees() -> list[trees.ReasoningTree]:
    """One and two images; a branch on either side of every prefix."""
    rng = np.random.default_rng(7)
    made = []
    for images in (1, 2):
        branches = []
        for i, n in zip([0, 0, 1, 1, 2, 2], rng.integers(1, 6, 6), strict=True):
            tokens = rng.integers(5, VOCAB, n).astype(np.int32)
            branches.append(trees.Branch(i, tokens, np.zeros(n, np.float32), "ok", len(branches) % 2 == 0))
        made.append(trees.ReasoningTree(make_trunk(rng, images), tuple(branches)))
    return made


def mask_of_twice(lengths, size):
    """A causal mask; in the second half of the sequences no token sees one of the prompt."""
    hidden = jnp.arange(len(lengths)) >= len(lengths) // 2
    return causal_mask(lengths, size) & ((jnp.arange(size) >= PROMPT) | ~hidden[:, None, None])


def naive_loss(params, graphdef, inputs):
    """SFT and the key sentence of whole sequences that stand there twice, and the loss if the query were seen."""
    with mock.patch.object(attention, "causal_mask", mask_of_twice):
        seen, hidden = jnp.split(sequence_logprobs(params, graphdef, inputs), 2)
    end = PROMPT + STEPS * STEP
    path, (with_query, without) = seen[:, PROMPT:], (-x[:, end - STEP : end].mean() for x in (seen, hidden))
    return -path.mean() + KEY * without, -path.mean() + KEY * with_query


def packed_loss(params, graphdef, batch):
    config = LossConfig({"sft": 1.0, "key_sentence": KEY})
    return jnp.mean(tree_loss(nnx.merge(graphdef, params), batch, config, COMPUTE)[0])


@pytest.mark.parametrize("pack", [SHORT, pytest.param(KEYED, marks=pytest.mark.slow)])
def test_the_key_sentence_has_the_loss_and_gradients_of_a_forward_pass_without_the_query(pack):
    batch_trees = two_trees()
    with precision("float64"):
        graphdef, params = model_parts("float64")
        batch, _ = trees.pack_trees(batch_trees, pack)
        trunks = [tree.trunk.encoded for tree in batch_trees]
        inputs = batch_inputs(2 * trunks, len(trunks[0].tokens))
        ours, grads = jax.jit(jax.value_and_grad(packed_loss), static_argnums=1)(params, graphdef, batch)
        naive = jax.jit(jax.value_and_grad(naive_loss, has_aux=True), static_argnums=1)
        (theirs, with_query), expected = naive(params, graphdef, inputs)
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    assert_equal_leaves(grads, expected)
    assert abs(float(with_query - theirs)) > 1e-3  # the check sees a key sentence that reads the query


def test_a_term_without_weight_leaves_the_program_as_it_is():
    def program(weights):
        config = LossConfig(weights)
        batch, _ = trees.pack_trees(two_trees(), dataclasses.replace(KEYED, extras=config.extras()))
        graphdef, params = model_parts("float32")
        compute = ComputeConfig(logprob_chunk=16)

        def loss(params, batch):
            return tree_loss(nnx.merge(graphdef, params), batch, config, compute)[0].sum()

        return str(jax.make_jaxpr(jax.value_and_grad(loss))(params, batch)), batch.rows.tokens.tobytes()

    assert program({"srpo": 1.0}) == program({"srpo": 1.0, "key_sentence": 0.0})
    assert program({"srpo": 1.0}) != program({"srpo": 1.0, "key_sentence": 0.1})
