"""The face: `import srpo_jax as sx`, from a checkpoint folder or a run to a loss and its gradient."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import srpo_jax as sx
from srpo_jax import config as configs
from srpo_jax.data import scenes
from srpo_jax.judges.verdict import Verdict
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.training.loop import train
from srpo_jax.training.workdir import open_workdir

EXPLORE = sx.ExploreConfig(k=4, max_tokens=10, trees=4, trunk=(144,), patches=(16,))


def judge(record, path):
    return Verdict(safe="rest" in path.answer, effective="rest" in path.answer, reason="")


@pytest.fixture(scope="module")
def folder(tiny_policy, tmp_path_factory):
    """The tiny policy in Hugging Face's format."""
    path = tmp_path_factory.mktemp("api") / "tiny"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def trees(tiny_policy):
    records = scenes.records("train", 4)
    return sx.explore(tiny_policy, tiny_policy.params, records, EXPLORE, judge, jax.random.key(0), progress=False)


def test_every_name_of_the_face_is_there():
    for name in sx.__all__:
        assert getattr(sx, name) is not None, name
    assert callable(sx.evaluate) and callable(sx.losses.srpo)
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        sx.train_everything  # noqa: B018


def test_importing_the_face_loads_nothing_heavy():
    code = "import sys, srpo_jax; print(sorted({'jax', 'transformers', 'datasets', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_policy_from_a_folder_gives_logits(folder, tiny_policy):
    policy = sx.load_policy(folder)
    picture = scenes.records("train", 2)[0].images[0]
    inputs = policy.encode([{"image": picture, "question": "May I rest here?"}, {"question": "May I rest?"}])
    logits = sx.forward(policy, policy.params, inputs)
    assert logits.shape == (*inputs.tokens.shape, 512) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, sx.forward(tiny_policy, tiny_policy.params, inputs))
    # Pure: other parameters in, other logits out.
    halved = jax.tree.map(lambda x: 0.5 * x, policy.params)
    assert not np.allclose(logits, sx.forward(policy, halved, inputs))


def test_the_loss_is_that_of_the_formula_on_the_same_logprobs_and_has_a_gradient(tiny_policy, trees):
    batch = sx.pack(trees, tiny_policy)
    assert isinstance(batch, sx.TreeBatch) and batch.pairs.any()

    @jax.jit
    def loss_and_gradient(head):
        params = tiny_policy.params | {"head": head}
        return sx.srpo_loss(tiny_policy, params, batch, lambda_=0.3)

    (loss, aux), gradient = jax.jit(jax.value_and_grad(loss_and_gradient, has_aux=True))(tiny_policy.params["head"])
    path, branch = tree_logprobs(nnx.merge(tiny_policy.graphdef, tiny_policy.params), batch)
    data = sx.losses.BranchLogprobs(branch, batch.lengths, batch.prefixes, batch.pairs)
    questions, told = sx.losses.srpo(path, batch.path_lengths, data, lambda_=0.3)
    np.testing.assert_allclose(loss, questions.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["contrastive_loss"], told["contrastive_loss"], rtol=1e-4)
    assert aux["has_pairs"].sum() > 0
    # Down the gradient by a small step, the loss falls as the gradient says.
    slope = float(jnp.sum(gradient**2))
    step = 1e-3 / slope**0.5
    lower, _ = loss_and_gradient(tiny_policy.params["head"] - step * gradient)
    np.testing.assert_allclose(float(loss - lower), step * slope, rtol=0.05)


def test_branches_from_elsewhere_are_scored_under_the_policy(tiny_policy, trees):
    """What explored them gives the log-probs that they were sampled with; other parameters give others."""
    unknown = [
        dataclasses.replace(
            tree, branches=tuple(dataclasses.replace(b, logprobs=0 * b.logprobs) for b in tree.branches)
        )
        for tree in trees
    ]
    scored = sx.score(tiny_policy, None, unknown, batch=len(trees))
    for tree, wanted in zip(scored, trees, strict=True):
        for ours, theirs in zip(tree.branches, wanted.branches, strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
            assert (ours.prefix, ours.verdict, ours.status) == (theirs.prefix, theirs.verdict, theirs.status)
    halved = tiny_policy.params | {"head": 0.5 * tiny_policy.params["head"]}
    [other] = sx.score(tiny_policy, halved, unknown[:1], batch=len(trees))
    assert not np.allclose(other.branches[0].logprobs, scored[0].branches[0].logprobs, atol=1e-2)


def test_packing_needs_no_configuration_whatever_the_trees(tiny_policy, trees):
    def batch(*chosen):
        return sx.pack(chosen, tiny_policy)

    trunk = trees[0].trunk
    bare = sx.ReasoningTree(trunk, ())
    one_token = sx.ReasoningTree(trunk, tuple(b for b in trees[0].branches if len(b.tokens) == 1)[:1])
    for chosen in ([bare], [bare, trees[1]], [one_token], trees):
        packed = batch(*chosen)
        assert packed.weight.shape == (len(chosen),)
        np.testing.assert_array_equal(packed.path_lengths, [len(t.trunk.path) for t in chosen])


def test_trees_of_another_tokenizer_are_refused(tiny_policy, trees):
    trunk = trees[1].trunk
    alien = dataclasses.replace(trees[1].branches[0], tokens=np.asarray([3, 512], np.int32))
    mixed = [trees[0], sx.ReasoningTree(trunk, (alien,))]
    with pytest.raises(ValueError, match=rf"record '{trunk.record_id}': token id 512 is none of the policy's 512"):
        sx.pack(mixed, tiny_policy)
    with pytest.raises(ValueError, match="no trees"):
        sx.pack([], tiny_policy)


def test_similar_trees_share_a_compiled_program(trees):
    """Every axis is a step of a coarse ladder."""
    shapes = {sx.pack(trees[:1] + chosen).rows.tokens.shape[1:] for chosen in ([t] for t in trees[1:])}
    assert all(n in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24) for n, _ in shapes)


def test_a_policy_from_a_run_is_the_one_that_was_trained(tiny_policy, folder, tmp_path):
    """A run of one update from a half-precision checkpoint; `load_policy` gives its newest parameters."""
    half = tmp_path / "half"
    tiny_policy.save(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_policy.params))
    config = configs.default_config()
    config.policy.path = str(half)
    config.policy.max_image_tokens = 4
    config.data.n = 2
    config.pack.update(trunk=(144,), path=(112,), patches=(16,), rows=(0,), branches=(0,), branch=(1,))
    config.batch.trees = 2
    config.update(rounds=0, updates=1, trainable=("^head$", "^norm/"))
    config.optim.learning_rate = 0.01
    workdir = open_workdir(tmp_path / "run", config)
    mesh = configs.build_mesh(config)
    start = configs.build_policy(config, mesh)
    params = train(start, configs.build_records(config), None, configs.run_config(config), workdir, mesh)
    policy = sx.load_policy(workdir)
    assert policy.processor.max_image_tokens == 4
    jax.tree.map(np.testing.assert_array_equal, policy.params, params)
    assert not np.array_equal(policy.params["head"], start.params["head"].astype(jnp.float32))
    np.testing.assert_array_equal(policy.params["embed"], start.params["embed"])
    with pytest.raises(FileNotFoundError):
        sx.load_policy(tmp_path / "nothing")
