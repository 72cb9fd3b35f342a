"""Promise: a couple shares all tokens up to the first unsafe step; from there the mended side is the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.exploration.intervention import intervene, step_start
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, pack_trees


@pytest.fixture(scope="module")
def made(tiny_policy):
    """A risky record, its trunk, and the tokens of each segment of a whole other path to it."""
    record, other = [r for r in scenes.records("train", 6) if r.risky][:2]
    segments = GRAMMAR.render(other.steps, record.unsafe_reply)
    pieces = [np.asarray(tiny_policy.processor.tokenize(text), np.int32) for text in segments]
    return record, make_trunk(record, tiny_policy.processor), pieces


def branch(prefix, pieces, eos, verdict=False):
    tokens = np.concatenate([*pieces[prefix:], [eos]]).astype(np.int32)
    return Branch(prefix, tokens, np.zeros(len(tokens), np.float32), "ok", verdict)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("unsafe", [2, 4, 5])
def test_a_couple_parts_at_the_first_unsafe_step(tiny_policy, made, prefix, unsafe):
    record, trunk, pieces = made
    bad = branch(prefix, pieces, tiny_policy.processor.eos_id)
    good = branch(prefix, pieces, tiny_policy.processor.eos_id, True)
    tree = ReasoningTree(trunk, (good, bad, bad))
    [original, mended] = intervene(tree, record, lambda r, p: [i < unsafe for i in range(6)], tiny_policy).branches
    shared = sum(len(p) for p in pieces[prefix:unsafe])
    assert original is bad and mended.verdict is True and not mended.on_policy
    np.testing.assert_array_equal(mended.tokens[:shared], bad.tokens[:shared])
    np.testing.assert_array_equal(mended.tokens[shared:], trunk.encoded.tokens[trunk.ends[unsafe] :])
    pack = PackConfig((160,), (112,), (20,), 128, (2,), (128,), (64,))
    batch, _ = pack_trees([ReasoningTree(trunk, (original, mended))], pack)
    assert batch.pairs.sum() == 1 and batch.pairs[0, 1, 0]


def test_a_branch_without_an_unsafe_step_of_its_own_is_left_out(tiny_policy, made):
    record, trunk, pieces = made
    tree = ReasoningTree(trunk, (branch(3, pieces, tiny_policy.processor.eos_id),))
    assert intervene(tree, record, lambda r, p: [True] * 6, tiny_policy).branches == ()
    assert intervene(tree, record, lambda r, p: [False] * 3 + [True] * 3, tiny_policy).branches == ()
    unknown = dataclasses.replace(tree, branches=(dataclasses.replace(tree.branches[0], verdict=None),))
    assert intervene(unknown, record, lambda r, p: [False] * 6, tiny_policy).branches == ()


def test_steps_begin_at_their_headings(tiny_policy, made):
    _, _, pieces = made
    tokens = np.concatenate(pieces)
    starts = np.cumsum([0, *map(len, pieces)])
    assert [step_start(tokens, i + 1, tiny_policy.processor) for i in range(6)] == starts[:6].tolist()
