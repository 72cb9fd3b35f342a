"""Promises of SafeKey's terms in an update: the loss and gradients of separate forward passes, in one of which the query is
hidden; heads that train, are restored and stay out of the policy; the very program of before where they have no weight."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srpo_jax import config as configs
from srpo_jax import losses, sharding, trees
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.data import scenes
from srpo_jax.files import read_jsonl
from srpo_jax.inputs import batch_inputs
from srpo_jax.models import attention, splash
from srpo_jax.models.heads import safety_logits
from srpo_jax.models.logprobs import token_logprobs
from srpo_jax.models.lora import LoraConfig, init_adapters, is_adapter
from srpo_jax.models.policy import load_policy
from srpo_jax.models.scoring import span_means
from srpo_jax.runs import load_run
from srpo_jax.training.loop import train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import abstract_state
from srpo_jax.training.step import ComputeConfig, tree_loss
from srpo_jax.training.workdir import open_workdir
from tests.training.killable import small_config
from tests.training.test_exactness import (
    PACK,
    PROMPT,
    STEP,
    STEPS,
    VOCAB,
    assert_equal_leaves,
    config,
    make_trunk,
    model_parts,
    precision,
)
from tests.training.test_loop import OUTPUT, RUN, judge

KEY, HEADS, THETA = 0.3, 0.4, 0.7
SAFEKEY = LossConfig({"sft": 1.0, "key_sentence": KEY, "safety_heads": HEADS}, {"safety_heads": {"theta": THETA}})
KEYED = dataclasses.replace(PACK, extras=SAFEKEY.extras(), key_step=STEPS)
SHORT = dataclasses.replace(KEYED, row=5, rows=(16,))  # the path is longer than a row
COMPUTE = ComputeConfig(dtype="float64", remat="none")
causal_mask = attention.causal_mask


def two_trees() -> list[trees.ReasoningTree]:
    """A risky question with one image, a harmless one with two; a branch on either side of every prefix."""
    rng = np.random.default_rng(7)
    made = []
    for images in (1, 2):
        branches = []
        for i, n in zip([0, 0, 1, 1, 2, 2], rng.integers(1, 6, 6), strict=True):
            tokens = rng.integers(5, VOCAB, n).astype(np.int32)
            branches.append(trees.Branch(i, tokens, np.zeros(n, np.float32), "ok", len(branches) % 2 == 0))
        trunk = dataclasses.replace(make_trunk(rng, images), risky=images == 1)
        made.append(trees.ReasoningTree(trunk, tuple(branches)))
    return made


def heads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return {path: rng.normal(size=x.shape) for path, x in SAFEKEY.parameters(config().text.hidden_size).items()}


def mask_of_twice(lengths, size):
    """A causal mask; in the second half of the sequences no token sees one of the prompt."""
    hidden = jnp.arange(len(lengths)) >= len(lengths) // 2
    return causal_mask(lengths, size) & ((jnp.arange(size) >= PROMPT) | ~hidden[:, None, None])


def naive_loss(params, graphdef, inputs):
    """All terms of whole sequences that stand there twice, a risky and a harmless one; and if the key read the query."""
    params, heads = params
    model = nnx.merge(graphdef, params)
    with mock.patch.object(attention, "causal_mask", mask_of_twice):
        states, _ = model.trunk(inputs, model.encode_images(inputs.vision))
    scores = token_logprobs(states[:, :-1], model.output_embedding, jnp.asarray(inputs.tokens)[:, 1:])
    seen, hidden = jnp.split(scores, 2)  # of the token after each
    begin, end = PROMPT + (STEPS - 1) * STEP, PROMPT + STEPS * STEP
    with_query, without = (-x[:, begin - 1 : end - 1].mean() for x in (seen, hidden))
    loss = -seen[:, PROMPT - 1 :].mean()
    for name, first, share in (("full", 0, 1 - THETA), ("understanding", PROMPT, THETA)):
        risky, harmless = states[:2, first:begin].mean(1) @ heads[f"heads/{name}/kernel"] + heads[f"heads/{name}/bias"]
        loss += HEADS * share * (jnp.log1p(jnp.exp(risky)) + jnp.log1p(jnp.exp(-harmless)))[0] / 2
    return loss + KEY * without, loss + KEY * with_query


def packed_loss(params, graphdef, batch):
    params, heads = params
    return jnp.mean(tree_loss(nnx.merge(graphdef, params), batch, SAFEKEY, COMPUTE, own=heads)[0])


@pytest.mark.parametrize("pack", [SHORT, pytest.param(KEYED, marks=pytest.mark.slow)])
def test_the_terms_have_the_loss_and_gradients_of_separate_forward_passes(pack):
    batch_trees = two_trees()
    with precision("float64"):
        graphdef, params = model_parts("float64")
        params = params, jax.tree.map(jnp.asarray, heads())
        batch, _ = trees.pack_trees(batch_trees, pack)
        trunks = [tree.trunk.encoded for tree in batch_trees]
        inputs = batch_inputs(2 * trunks, len(trunks[0].tokens))
        ours, grads = jax.jit(jax.value_and_grad(packed_loss), static_argnums=1)(params, graphdef, batch)
        naive = jax.jit(jax.value_and_grad(naive_loss, has_aux=True), static_argnums=1)
        (theirs, with_query), expected = naive(params, graphdef, inputs)
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    assert_equal_leaves(grads, expected)
    assert abs(float(with_query - theirs)) > 1e-3  # the check sees a key sentence that reads the query


def test_the_kernel_for_tpus_hides_the_query_too():
    """Its mask of a buffer: every token of a path that stands there again sees the earlier ones, and nothing else."""
    batch, _ = trees.pack_trees(two_trees(), SHORT)
    rows = trees.Rows(*(x[0] for x in batch.rows))
    seen = np.asarray(splash._seen(rows.segments, rows.limits, rows.context))
    for slot, tree in zip(batch.key_slots, batch.path_targets, strict=True):
        last = int(batch.predictors[0, slot + STEP - 1])
        own = np.arange(last - (STEPS * STEP - 2), last + 1)  # rows are filled one after the other
        assert rows.tokens.reshape(-1)[own].tolist() == tree[: len(own)].tolist()
        np.testing.assert_array_equal(seen[own][:, own], np.tri(len(own), dtype=bool))
        assert seen[own].sum() == np.tri(len(own)).sum()


def test_a_term_without_weight_leaves_the_program_as_it_is():
    def program(weights):
        config = LossConfig(weights)
        batch, _ = trees.pack_trees(two_trees(), dataclasses.replace(KEYED, extras=config.extras()))
        graphdef, params = model_parts("float32")
        compute = ComputeConfig(logprob_chunk=16)

        def loss(params, batch):
            return tree_loss(nnx.merge(graphdef, params), batch, config, compute)[0].sum()

        return str(jax.make_jaxpr(jax.value_and_grad(loss))(params, batch)), batch.rows.tokens.tobytes()

    assert program({"srpo": 1.0}) == program({"srpo": 1.0, "key_sentence": 0.0, "safety_heads": 0.0})
    assert program({"srpo": 1.0}) != program({"srpo": 1.0, "key_sentence": 0.1})


def test_heads_read_the_mean_hidden_states_of_their_spans():
    """In numpy, from the states of the buffer; a question without a label or a key step has none, and no loss."""
    one, other = two_trees()
    other = dataclasses.replace(other, trunk=dataclasses.replace(other.trunk, risky=None))
    short = dataclasses.replace(one, trunk=dataclasses.replace(one.trunk, ends=one.trunk.ends[:3]))
    batch, _ = trees.pack_trees([one, other, short], dataclasses.replace(KEYED, rows=(15,)), buffers=1)
    assert batch.safe.tolist() == [0, -1, -1]
    rng = np.random.default_rng(9)
    hidden = rng.normal(size=(1, batch.rows.tokens[0].size, 16))
    means = np.asarray(span_means(jnp.asarray(hidden), batch.understanding))
    tokens = batch.rows.tokens.reshape(-1)
    for i, tree in enumerate((one, other)):
        trunk, begin = tree.trunk.encoded.tokens, PROMPT + (STEPS - 1) * STEP
        first = int(batch.understanding[i, 0, 0])
        assert tokens[first : first + len(trunk)].tolist() == trunk.tolist()
        for span, (a, b) in enumerate([(0, begin), (PROMPT, begin)]):
            np.testing.assert_allclose(means[i, span], hidden[0, first + a : first + b].mean(0), rtol=1e-4, atol=1e-5)
    assert not means[2].any()
    loss, told = losses.safety_head_loss(*safety_logits(heads(), jnp.asarray(means)), batch.safe)
    kernels = [heads()[f"heads/{name}/{part}"] for name in ("full", "understanding") for part in ("kernel", "bias")]
    logits = [means[0, 0] @ kernels[0] + kernels[1], means[0, 1] @ kernels[2] + kernels[3]]
    assert float(loss[0]) == pytest.approx(np.mean([np.log1p(np.exp(x)) for x in logits]), rel=1e-4)
    assert loss.tolist()[1:] == [0, 0] and told["has_safety_label"].tolist() == [1, 0, 0]


def test_heads_train_beside_adapters_alone(tiny_policy):
    shapes = jax.eval_shape(lambda: tiny_policy.params)
    adapters = jax.eval_shape(lambda: init_adapters(shapes, LoraConfig(2), 0))
    params = sharding.unflatten(sharding.flatten(shapes) | adapters)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    own = SAFEKEY.parameters(tiny_policy.config.text.hidden_size)
    state = abstract_state(params, RUN.optim.make(), None, mesh, own=own)
    assert state.params.keys() == own.keys() | {path for path in adapters if is_adapter(path)}
    assert jax.tree.structure(state.all_params()) == jax.tree.structure(params)


WEIGHTS = {"srpo": 1.0, "key_sentence": 0.2, "safety_heads": 0.2}


@pytest.fixture(scope="module")
def trained(tiny_policy, tmp_path_factory):
    """A round of three updates on explored trees with a checkpoint after each: work directory, how to run it, what came out."""
    loss = LossConfig(WEIGHTS)
    pack = dataclasses.replace(RUN.pack, rows=(14, 26), extras=loss.extras())
    run = dataclasses.replace(RUN, loss=loss, pack=pack, rounds=1, updates=3, trainable=OUTPUT)
    workdir, records = tmp_path_factory.mktemp("safekey"), scenes.records("train", 4)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    go = functools.partial(train, tiny_policy, records, judge, run, mesh=mesh)
    return workdir, go, go(workdir=workdir)


def heads_at(workdir, step: int, policy) -> dict[str, np.ndarray]:
    own = LossConfig(WEIGHTS).parameters(policy.config.text.hidden_size)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    like = abstract_state(policy.params, RUN.optim.make(), OUTPUT, mesh, own=own).moving()
    with Checkpointer(workdir / "checkpoints", keep=9) as checkpoints:
        state, _ = checkpoints.restore(step, like)
    return {path: np.asarray(x) for path, x in state.params.items() if path in own}


def test_heads_train_beside_the_policy_and_are_no_part_of_it(trained, tiny_policy):
    """Whatever the patterns of what moves; the metrics tell each term."""
    workdir, _, params = trained
    assert jax.tree.structure(params) == jax.tree.structure(tiny_policy.params)
    before, after = heads_at(workdir, 1, tiny_policy), heads_at(workdir, 3, tiny_policy)
    assert len(after) == 4 and all(x.any() and (x != before[path]).any() for path, x in after.items())
    lines = list(read_jsonl(workdir / "metrics.jsonl"))
    assert [line["has_safety_label"] for line in lines] == [line["has_key_sentence"] for line in lines] == [1, 1, 1]
    assert lines[0]["loss/safety_heads"] == pytest.approx(np.log(2), rel=1e-6)  # heads of zeros
    for line in lines:
        assert {"head_loss_full", "head_accuracy_understanding", "key_sentence_loss"} <= line.keys()
        total = sum(line[f"weight/{name}"] * line[f"loss/{name}"] for name in WEIGHTS)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert lines[2]["loss/key_sentence"] < lines[0]["loss/key_sentence"]
    assert lines[2]["loss/safety_heads"] < lines[0]["loss/safety_heads"]


def test_a_resumed_run_has_the_bits_of_heads_and_policy(trained, tiny_policy, tmp_path):
    workdir, go, params = trained
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    for step in (2, 3):
        shutil.rmtree(copy / "checkpoints" / str(step))
    again = go(workdir=copy)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, heads_at(copy, 3, tiny_policy), heads_at(workdir, 3, tiny_policy))
    assert (copy / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1])
def test_two_weights_in_the_configuration_train_and_the_export_is_a_policy_without_heads(tmp_path, rounds):
    config = small_config()
    config.loss.weights.update(srpo=1.0, key_sentence=0.2, safety_heads=0.2)
    config.update(rounds=rounds, updates=2)
    open_workdir(tmp_path / "run", config)
    mesh, run = configs.build_mesh(config), configs.run_config(config)
    data, judge = configs.build_records(config), configs.build_judge(config)
    params = train(configs.build_policy(config, mesh), data, judge, run, tmp_path / "run", mesh)
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [line["has_key_sentence"] for line in lines] == [line["has_safety_label"] for line in lines] == [1, 1]
    policy, step = load_run(tmp_path / "run")
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, policy.params, params)
    policy.save(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "hf").params, params)
