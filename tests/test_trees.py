"""Trees on the host and their packing: what counts, what is paired, and that nothing is lost on the way to static shapes."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax import trees
from srpo_jax.inputs import Encoded
from srpo_jax.trees import FAVOURABLE, UNFAVOURABLE, UNKNOWN, Branch, PackConfig, ReasoningTree, Trunk

ENDS = (4, 6, 8, 10)
CONFIG = PackConfig(trunk=(16, 32), path=(12,), rows=tuple(range(1, 40)), row=9, branches=(40,), branch=(10,))


def make_trunk(unsafe=None) -> Trunk:
    tokens = np.arange(100, 113, dtype=np.int32)
    positions = np.broadcast_to(np.arange(13, dtype=np.int32), (3, 13))
    return Trunk("r1", Encoded(tokens, positions, np.full(13, -1, np.int32)), ENDS, unsafe)


def branch(prefix, tokens, verdict, status="ok"):
    tokens = np.asarray(tokens, np.int32)
    return Branch(prefix, tokens, np.linspace(-1, -0.1, len(tokens), dtype=np.float32), status, verdict, "because")


branch_lists = st.lists(
    st.builds(
        branch,
        st.integers(0, 2),
        st.lists(st.integers(1, 3), min_size=1, max_size=10),
        st.sampled_from([True, False, None]),
        st.sampled_from(["ok", "truncated", "judge_failed"]),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(st.lists(branch_lists, min_size=2, max_size=2), st.integers(1, 2))
def test_every_token_is_packed_once_with_what_it_sees_and_what_it_predicts(lists, buffers):
    batch_trees = [ReasoningTree(make_trunk(), tuple(branches)) for branches in lists]
    batch, counters = trees.pack_trees(batch_trees, CONFIG, buffers=buffers)
    assert batch.rows.tokens.shape[0] == buffers
    packed = 0
    for i, tree in enumerate(batch_trees):
        g, place = (0, i) if buffers == 1 else (i, 0)
        usable, _, _ = trees.usable_branches(tree, CONFIG)
        rows = trees.Rows(*(x[g] for x in batch.rows))
        first = np.unique(rows.context[:, 0])[place]  # a tree's rows share their context
        mine = (rows.segments >= 0) & (rows.context[:, 0] == first)[:, None]
        packed += mine.sum()
        pieces = [(tree.trunk.encoded.tokens, 0, None)]
        pieces += [(b.tokens[:-1], ENDS[b.prefix], ENDS[b.prefix]) for b in usable]
        for segment, (tokens, start, limit) in enumerate(pieces):
            here = mine & (rows.segments == segment)
            where = np.argwhere(here)
            assert rows.tokens[here].tolist() == tokens.tolist()
            assert (rows.positions[:, here] == start + np.arange(len(tokens))).all()
            for at, (r, c) in enumerate(where):
                own = (rows.segments[r, :c] == segment).sum()  # the rest of what it must see, in the trunk
                assert rows.limits[r, c] == (at - own if limit is None else limit)
                trunk_rows = rows.tokens[rows.context[r]].reshape(-1)
                seen = trunk_rows[: rows.limits[r, c]]
                assert seen.tolist() == tree.trunk.encoded.tokens[: rows.limits[r, c]].tolist()
        # The slots lead to the scored tokens, and to the tokens before them.
        scored = [(tree.trunk.path, batch.path_slots[i], ENDS[0])]
        scored += [(b.tokens, batch.branch_slots[i, m], ENDS[b.prefix]) for m, b in enumerate(usable)]
        buffer = rows.tokens.reshape(-1)
        for tokens, slot, end in scored:
            assert batch.targets[g, slot : slot + len(tokens)].tolist() == tokens.tolist()
            before = [tree.trunk.encoded.tokens[end - 1], *tokens[:-1]]
            assert buffer[batch.predictors[g, slot : slot + len(tokens)]].tolist() == before
        assert batch.lengths[i].tolist() == [len(b.tokens) for b in usable] + [0] * (40 - len(usable))
        assert batch.prefix_lengths[i, : len(usable)].tolist() == [ENDS[b.prefix] - ENDS[0] for b in usable]
    assert packed == (batch.rows.segments >= 0).sum() == counters["tokens"]
    assert (batch.targets >= 0).sum() == batch.lengths.sum() + batch.path_lengths.sum()


@settings(deadline=None)
@given(branch_lists)
def test_no_branch_is_lost_silently(branches):
    usable, verdicts, counts = trees.usable_branches(ReasoningTree(make_trunk(), tuple(branches)), CONFIG)
    assert len(usable) + counts["merged"] + counts["dropped"] == len(branches)
    assert UNKNOWN not in verdicts
    keys = [(b.prefix, tuple(b.tokens.tolist())) for b in usable]
    assert len(set(keys)) == len(keys)


@settings(deadline=None)
@given(branch_lists, st.sampled_from([None, 1, 2, 3, 4, 7]), st.booleans())
def test_branches_that_no_pair_needs_are_left_out_and_the_pairs_stay(branches, most, substitutes):
    tree = ReasoningTree(make_trunk(unsafe=np.asarray([7, 8], np.int32)), tuple(branches))
    config = dataclasses.replace(CONFIG, max_pairs=most, substitutes=substitutes)

    def pairs(learns):
        used, verdicts, counts = trees.usable_branches(tree, dataclasses.replace(config, learns=learns))
        chosen = trees.select_pairs([b.prefix for b in used], verdicts, most)
        named = {
            tuple((used[i].prefix, used[i].tokens.tobytes()) for i in ij)
            for ij in zip(*np.nonzero(chosen), strict=True)
        }
        return named, used, verdicts, counts

    (every, used, verdicts, counts), (same, paired, _, left) = pairs("all"), pairs("paired")
    assert same == every and {(b.prefix, b.tokens.tobytes()) for b in paired} == {one for two in every for one in two}
    assert left["idle"] == len(used) - len(paired) and left["dropped"] == counts["dropped"] and counts["idle"] == 0
    assert pairs("favourable")[2] == [v for v in verdicts if v == FAVOURABLE]


@settings(deadline=None)
@given(branch_lists)
def test_json_round_trip_is_exact(branches):
    tree = ReasoningTree(make_trunk(), tuple(branches))
    again = ReasoningTree.from_json(json.loads(json.dumps(tree.to_json())), tree.trunk)
    for a, b in zip(tree.branches, again.branches, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.prefix, a.status, a.verdict, a.reason) == (b.prefix, b.status, b.verdict, b.reason)


def test_a_stored_tree_of_a_changed_record_is_refused():
    tree = ReasoningTree(make_trunk(), ())
    other = dataclasses.replace(tree.trunk, ends=(4, 6, 8, 11))
    with pytest.raises(ValueError, match="record 'r1' has another trunk"):
        ReasoningTree.from_json(tree.to_json(), other)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.lists(st.integers(1, 20), max_size=3))
def test_rows_hold_every_sequence_once_and_overflow_none(lengths, taken):
    rows = trees.pack_rows(lengths, 20, taken)
    assert sorted(m for row in rows for m in row) == [m for m, n in enumerate(lengths) if n]
    taken += [0] * (len(rows) - len(taken))
    sizes = [n + sum(lengths[m] for m in row) for n, row in zip(taken, rows, strict=True)]
    assert max(sizes, default=0) <= 20
    # First fit leaves no two rows of branches that would fit into one, nor a branch that fits into an earlier row.
    for r, row in enumerate(rows):
        assert all(sizes[e] + lengths[m] > 20 for m in row for e in range(r))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 4))
def test_balanced_buffers_hold_equally_many_trees_and_similar_totals(sizes, buffers):
    sizes = sizes * buffers
    order = trees.balance(sizes, buffers)
    assert sorted(order) == list(range(len(sizes)))
    totals = np.asarray(sizes)[order].reshape(buffers, -1).sum(axis=1)
    assert totals.max() - totals.min() <= max(sizes)


def test_verdicts_of_malformed_branches_follow_the_policy_and_failed_judges_are_dropped():
    cases = {"truncated": UNFAVOURABLE, "no_close": UNFAVOURABLE, "judge_failed": UNKNOWN, "ok": UNKNOWN}
    for status, as_unfavourable in cases.items():
        assert trees.verdict_of(branch(0, [1], None, status)) == UNKNOWN
        assert trees.verdict_of(branch(0, [1], None, status), "unfavourable") == as_unfavourable


def test_identical_branches_with_different_verdicts_are_unknown():
    tree = ReasoningTree(make_trunk(), (branch(0, [1, 2], True), branch(0, [1, 2], False), branch(1, [1, 2], True)))
    usable, verdicts, counts = trees.usable_branches(tree, CONFIG)
    assert [b.prefix for b in usable] == [1]
    assert verdicts == [FAVOURABLE]
    assert counts == {"merged": 1, "dropped": 1, "idle": 0}


def test_substitutes_fill_one_sided_prefixes_with_the_records_own_continuation():
    trunk = make_trunk(unsafe=np.asarray([7, 8], np.int32))
    tree = ReasoningTree(trunk, (branch(0, [1], True), branch(2, [2], False)))
    usable, verdicts, _ = trees.usable_branches(tree, dataclasses.replace(CONFIG, substitutes=True))
    extra = [(b.prefix, b.tokens.tolist(), v) for b, v in zip(usable, verdicts, strict=True) if not b.on_policy]
    tokens = trunk.encoded.tokens.tolist()
    assert extra == [(0, [*tokens[4:10], 7, 8], UNFAVOURABLE), (2, tokens[8:], FAVOURABLE)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([FAVOURABLE, UNFAVOURABLE, UNKNOWN])), max_size=16),
    st.integers(1, 6),
)
def test_pairs_are_favourable_against_unfavourable_of_one_prefix(items, limit):
    prefixes, verdicts = [p for p, _ in items], [v for _, v in items]
    every, some = trees.select_pairs(prefixes, verdicts), trees.select_pairs(prefixes, verdicts, limit)
    expected = {
        (a, b)
        for a in range(len(items))
        for b in range(len(items))
        if prefixes[a] == prefixes[b] and (verdicts[a], verdicts[b]) == (FAVOURABLE, UNFAVOURABLE)
    }
    assert set(zip(*np.nonzero(every), strict=True)) == expected
    assert not (some & ~every).any()
    for i in range(3):
        mine = np.asarray(prefixes, int) == i
        total, kept = every[mine].sum(), some[mine].sum()
        assert kept == min(limit, total)
        used = some[mine].sum(axis=1)[every[mine].any(axis=1)]
        assert used.size == 0 or used.max() - used.min() <= 1  # spread evenly over the favourable branches


def test_what_does_not_fit_is_refused_by_record_and_name():
    tree = ReasoningTree(make_trunk(), (branch(0, range(1, 11), True),))
    fits = ReasoningTree(dataclasses.replace(make_trunk(), record_id="r0"), ())
    for change, message in (
        ({"trunk": (12,)}, r"trunk tokens \(pack\.trunk\): 13 exceeds the largest bucket 12"),
        ({"path": (8,)}, r"path and reply \(pack\.path\): 9 exceeds the largest bucket 8"),
        ({"row": 8}, r"a branch in a row \(pack\.row\): 9 exceeds the largest bucket 8"),
        ({"branch": (9,)}, r"branch tokens \(pack\.branch\): 10 exceeds the largest bucket 9"),
        ({"rows": (2,)}, r"rows of trunk and branches \(pack\.rows\): 3 exceeds the largest bucket 2"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            trees.pack_trees([fits, tree], dataclasses.replace(CONFIG, **change))
        both_fail = {"trunk", "path"} & change.keys()
        assert f"record {'r0' if both_fail else 'r1'!r}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": "skip"}, "unknown='skip'"),
        ({"max_pairs": 0}, "max_pairs=0"),
        ({"row": 0}, "row=0"),
        ({"trunk": (32, 16)}, r"trunk=\(32, 16\): .*ascending"),
        ({"patches": ()}, r"patches=\(\): .*at least one"),
    ],
)
def test_shapes_that_cannot_work_are_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_trunks_are_checked_before_exploration_by_record():
    trunk = make_trunk(unsafe=np.arange(8, dtype=np.int32))  # substitutes of 9 and 6 + 8 tokens
    check = trees.check_trunks
    check([trunk], CONFIG)
    for change, size in (({"trunk": (12,)}, 13), ({"path": (8,)}, 9)):
        with pytest.raises(ValueError, match=rf"record 'r1': .*pack\.{next(iter(change))}\): {size} exceeds"):
            check(iter([trunk]), dataclasses.replace(CONFIG, **change))
    roomy = dataclasses.replace(CONFIG, substitutes=True, branch=(14,), row=13)
    check([trunk], roomy, k=4, max_tokens=10)
    for change, size in (({"branch": (13,)}, 14), ({"row": 12}, 13), ({"rows": (15,)}, 16)):
        with pytest.raises(ValueError, match=rf"record 'r1': .*pack\.{next(iter(change))}\): {size} exceeds"):
            check([trunk], dataclasses.replace(roomy, **change), k=4, max_tokens=10)
    # What passes is packed: the worst mixture of branches and substitutes.
    worst = [branch(i, [i, n, *range(8)], n < 4) for i in range(3) for n in range(4)]
    tight = dataclasses.replace(roomy, rows=(16,), branches=(15,))
    check([trunk], tight, k=4, max_tokens=10)
    batch, _ = trees.pack_trees([ReasoningTree(trunk, tuple(worst))], tight)
    assert batch.lengths[0].tolist() == [10] * 12 + [14, 12, 10]


@settings(deadline=None)
@given(branch_lists, st.integers(2, 4))
def test_the_path_to_the_key_step_is_packed_again_and_sees_nothing_of_the_prompt(branches, step):
    """In rows of its own behind the tree's, which stay as they are; a path without the step has none."""
    tree = ReasoningTree(make_trunk(), tuple(branches))
    config = dataclasses.replace(CONFIG, row=9 if branches else 3, extras=("key_lengths", "key_slots"), key_step=step)
    (batch, counters), (plain, _) = (
        trees.pack_trees([tree], c) for c in (config, dataclasses.replace(config, extras=()))
    )
    rows, mine = trees.Rows(*(x[0] for x in batch.rows)), plain.rows.tokens.shape[1]
    for ours, theirs in zip(rows, plain.rows, strict=True):
        if ours is not rows.context:
            np.testing.assert_array_equal(np.moveaxis(ours, -2, 0)[:mine], np.moveaxis(theirs[0], -2, 0))
    begin, end = tree.trunk.step(step) or (0, 0)
    read = slice(ENDS[0], max(end - 1, ENDS[0]))
    valid = rows.segments[mine:] >= 0
    assert rows.tokens[mine:][valid].tolist() == tree.trunk.encoded.tokens[read].tolist()
    assert rows.positions[0, mine:][valid].tolist() == tree.trunk.encoded.positions[0, read].tolist()
    for r in range(mine, len(rows.tokens)):
        assert set(rows.limits[r][valid[r - mine]]) == {(r - mine) * config.row}  # of rows that hold nothing else:
        assert rows.context[r].tolist() == [min(mine + w, len(rows.tokens) - 1) for w in range(rows.context.shape[1])]
    slot, length = batch.key_slots[0], batch.key_lengths[0]
    assert length == end - begin and counters["tokens"] == (batch.rows.segments >= 0).sum()
    scored = slice(slot, slot + length)
    assert batch.targets[0, scored].tolist() == tree.trunk.encoded.tokens[begin:end].tolist()
    before = rows.tokens.reshape(-1)[batch.predictors[0, scored]] if length else []
    assert list(before) == tree.trunk.encoded.tokens[begin - 1 : end - 1].tolist()[:length]
    assert ((batch.predictors[0, scored] >= mine * config.row) | (length == 0)).all()
