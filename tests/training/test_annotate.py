"""Promises: reference log-probs are those of the starting policy, computed once; a step ends where the next begins."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.exploration.explorer import ExploreConfig, explore
from srpo_jax.files import read_jsonl
from srpo_jax.judges.verdict import Verdict
from srpo_jax.paths import Grammar
from srpo_jax.training import annotate as module
from srpo_jax.training.annotate import annotate, step_length, with_reference
from srpo_jax.training.data import BatchConfig
from srpo_jax.training.loop import RunConfig, train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig
from srpo_jax.training.step import ComputeConfig
from srpo_jax.trees import PackConfig, pack_trees, usable_branches

EXPLORE = ExploreConfig(k=4, max_tokens=10, trees=4, trunk=(144,), patches=(16,))
PACK = PackConfig((144,), (112,), (20,), 20, (24,), (10,), (16,), extras=("reference", "step_lengths"))
COMPUTE = ComputeConfig(remat="none")


def judge(record, path):
    return Verdict(safe="rest" in path.answer, effective="rest" in path.answer, reason="")


@pytest.fixture(scope="module")
def trees(tiny_policy):
    records = scenes.records("train", 4)
    return explore(tiny_policy, tiny_policy.params, records, EXPLORE, judge, jax.random.key(0), progress=False)


@pytest.fixture(scope="module")
def told(tiny_policy, trees, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return folder, annotate(trees, tiny_policy, PACK, COMPUTE, 2, folder)


def test_reference_log_probs_are_those_that_sampled_where_the_policy_is_the_reference(told):
    """Exploration and scoring compute the same numbers, token by token, for every branch that counts."""
    found = 0
    for tree in told[1]:
        for branch in usable_branches(tree, PACK)[0]:
            np.testing.assert_allclose(branch.reference, branch.logprobs, atol=1e-4)
            found += 1
    assert found > 10


def test_reference_log_probs_are_computed_once_and_only_where_missing(told, tiny_policy, trees, monkeypatch):
    folder, first = told
    file = folder / "reference.jsonl"
    lines = list(read_jsonl(file))
    assert len(lines) == 4
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    sizes, inner = [], module.score_trees

    def spy(graphdef, params, missing, *args, **options):
        sizes.append(len(missing))
        return inner(graphdef, params, missing, *args, **options)

    monkeypatch.setattr(module, "score_trees", spy)
    again = annotate(trees, tiny_policy, PACK, COMPUTE, 2, folder)
    assert sizes == [1]
    for a, b in zip(first, again, strict=True):
        for x, y in zip(a.branches, b.branches, strict=True):
            assert (x.reference is None) == (y.reference is None)
            if x.reference is not None:
                np.testing.assert_allclose(x.reference, y.reference, atol=1e-5)
    half = dataclasses.replace(tiny_policy, params=jax.tree.map(lambda x: 0.5 * x, tiny_policy.params))
    with_reference(trees, half, PACK, COMPUTE, 4, folder)
    assert sizes == [1, 4]  # another reference model: nothing stored is taken for its own


def test_batches_carry_what_was_asked_for(told, trees):
    batch, _ = pack_trees(told[1], PACK)
    assert batch.reference.shape == batch.sampled.shape == batch.tokens.shape
    assert np.all(batch.step_lengths <= batch.lengths) and batch.step_lengths.max() > 0
    assert batch.counts.sum() == sum(b.verdict is not None for t in trees for b in t.branches)
    with pytest.raises(ValueError, match=r"record '.*': a branch has no step.*training\.annotate"):
        pack_trees(trees, dataclasses.replace(PACK, extras=("step_lengths",)))


@pytest.mark.parametrize("prefix", range(6))
def test_a_step_ends_where_the_next_begins(tiny_policy, prefix):
    record = scenes.records("train", 2)[0]
    segments = Grammar().render(record.steps, record.safe_reply)
    pieces = [tiny_policy.processor.tokenize(text) for text in segments[prefix:]]
    tokens = np.concatenate(pieces).astype(np.int32)
    assert step_length(tokens, tiny_policy.processor) == len(pieces[0])
    assert step_length(tokens[: len(pieces[0]) - 2], tiny_policy.processor) == len(pieces[0]) - 2


def test_a_run_with_a_reference_model_starts_at_its_known_loss_and_resumes(tiny_policy, tmp_path):
    """DPO begins at ln 2; its reference stays the policy before training, in the second round, too."""
    records = scenes.records("train", 4)
    loss = LossConfig({"dpo": 1.0, "step_dpo": 1.0})
    run = RunConfig(
        explore=EXPLORE,
        loss=loss,
        optim=OptimConfig(1e-3, steps=2, schedule="constant"),
        pack=PACK,
        batch=BatchConfig(trees=4),
        compute=COMPUTE,
        updates=1,
        rounds=2,
        max_truncated=1.0,
        max_unknown=1.0,
        trainable=("^head$", "^norm/"),
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    train(tiny_policy, records, judge, run, tmp_path, mesh)
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    for name in ("dpo", "step_dpo"):
        assert first[f"loss/{name}"] / first["has_pairs"] == pytest.approx(np.log(2), abs=1e-4)
        assert first[f"margin_{name}"] == pytest.approx(0, abs=1e-3)
    assert second["margin_dpo"] > 0.01 > abs(first["margin_dpo"])
    lines = [list(read_jsonl(tmp_path / "trees" / f"round_00{r}" / "reference.jsonl")) for r in (0, 1)]
    assert lines[0][0]["parameters"] == lines[1][0]["parameters"]
