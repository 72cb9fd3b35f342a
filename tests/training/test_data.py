"""Promises of the input pipeline: the batches of an update depend on its number alone; an epoch has every question once."""

import dataclasses
import itertools

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.inputs import Encoded
from srpo_jax.training.data import BatchConfig, DemonstrationTrees, step_batches
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Trunk

PACK = PackConfig(trunk=(8,), path=(8,), rows=(2,), row=4, branches=(0,), branch=(1,))


def tree(index: int) -> ReasoningTree:
    tokens = np.full(6, index, np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (3, 6))
    return ReasoningTree(Trunk(f"q{index}", Encoded(tokens, positions, np.full(6, -1, np.int32)), (2, 4)), ())


def branch(length: int) -> Branch:
    return Branch(0, np.arange(length, dtype=np.int32), np.zeros(length, np.float32), "ok", True)


SOURCE = [tree(index) for index in range(7)]


def ids(start, stop, first=0, source=SOURCE, **config):
    config = BatchConfig(**({"trees": 2} | config))
    return [b.record_ids for b in step_batches(source, PACK, config, start, stop, first)]


def test_every_question_once_per_epoch_in_an_order_that_changes():
    flat = list(itertools.chain(*ids(0, 14)))  # four epochs of seven
    epochs = [flat[i : i + 7] for i in range(0, 28, 7)]
    for epoch in epochs:
        assert sorted(epoch) == [f"q{i}" for i in range(7)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_a_start_in_the_middle_gives_the_same_batches(threads):
    whole = ids(0, 12)
    for start in range(12):
        assert ids(start, 12, threads=threads) == whole[start:]


def test_a_later_round_counts_from_its_first_update():
    assert ids(20, 24, first=20) == ids(0, 4)
    assert ids(22, 24, first=20) == ids(2, 4)
    assert [b.step for b in step_batches(SOURCE, PACK, BatchConfig(2), 22, 24, 20)] == [22, 23]


def test_another_seed_gives_another_order():
    assert ids(0, 7, seed=1) != ids(0, 7, seed=0) == ids(0, 7, seed=0)


def test_accumulation_splits_the_same_questions_into_micro_batches():
    [one] = step_batches(SOURCE, PACK, BatchConfig(trees=6), 0, 1)
    [three] = step_batches(SOURCE, PACK, BatchConfig(trees=2, accumulate=3), 0, 1)
    [spread] = step_batches(SOURCE, PACK, BatchConfig(trees=2, accumulate=3), 0, 1, buffers=2)
    shapes = {"one": (one, (1, 1, 12, 4)), "three": (three, (3, 1, 4, 4)), "spread": (spread, (3, 2, 2, 4))}
    for batch, shape in shapes.values():
        assert sorted(batch.record_ids) == sorted(one.record_ids)
        assert batch.batches.rows.tokens.shape == shape
        assert [f"q{i}" for i in batch.batches.rows.tokens[..., ::2, 0].ravel()] == batch.record_ids
        assert [f"q{i}" for i in batch.batches.path_targets[..., 0].ravel()] == batch.record_ids


def test_micro_batches_get_similar_numbers_of_tokens():
    """Large and small trees are dealt out, so that the shape that all must share is not that of the unluckiest."""
    sizes = [40, 4, 4, 4, 40, 4, 4, 4]
    source = [dataclasses.replace(tree(i), branches=(branch(n),)) for i, n in enumerate(sizes)]
    pack = PackConfig(trunk=(8,), path=(8,), rows=tuple(range(20)), row=40, branches=(1,), branch=(41,))
    [two] = step_batches(source, pack, BatchConfig(trees=4, accumulate=2), 0, 1)
    tokens = (two.batches.rows.segments >= 0).sum(axis=(1, 2, 3))
    assert tokens[0] == tokens[1] == 4 * 6 + 39 + 3 * 3


def test_a_tree_that_does_not_fit_is_an_error_of_the_run_not_of_a_thread():
    short = PackConfig(trunk=(4,), path=(8,), rows=(2,), row=4, branches=(0,), branch=(1,))
    with pytest.raises(ValueError, match=r"record 'q\d': trunk tokens .*: 6 exceeds"):
        list(step_batches(SOURCE, short, BatchConfig(2), 0, 3))


def test_demonstrations_are_made_when_read(tiny_policy):
    demonstrations = scenes.demonstrations()
    source = DemonstrationTrees([demonstrations[i] for i in range(3)], tiny_policy.processor)
    assert len(source) == 3
    one, example = source[1], demonstrations[1]
    assert one.trunk.record_id == example.record.id and one.branches == ()
    text = tiny_policy.processor.decode(one.trunk.path)
    assert example.reply in text and all(step in text for step in example.steps)


@pytest.mark.parametrize("change", [{"trees": 0}, {"trees": 2, "accumulate": 0}])
def test_an_update_without_questions_is_refused(change):
    with pytest.raises(ValueError, match="at least 1"):
        BatchConfig(**change)
