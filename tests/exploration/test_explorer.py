"""Promises of exploration: K branches of every proper prefix, nothing computed or asked twice, resumable line by line."""

import dataclasses
import json
import shutil
import zlib
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.exploration.adaptive import replay
from srpo_jax.exploration.explorer import (
    JUDGE_FAILED,
    ExploreConfig,
    exploration_statistics,
    explore,
    explore_shape,
    sample_trees,
)
from srpo_jax.exploration.judging import ask, is_favourable, judge_name
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.judges import rules
from srpo_jax.judges.verdict import Verdict
from srpo_jax.trees import Branch, ReasoningTree

K, BUDGET = 3, 10
CONFIG = ExploreConfig(k=K, max_tokens=BUDGET, trees=3, trunk=(144,), patches=(16,))
KEY = jax.random.key(3)


class Judge:
    """A judge that knows its mind by the answer's text, and remembers what it was asked."""

    name = "sides-1"

    def __init__(self):
        self.asked = []

    def __call__(self, record, path):
        self.asked.append((record.id, path.answer, len(path.steps)))
        side = zlib.crc32(path.answer.encode()) % 3
        return Verdict(None if side == 0 else side > 1, True, f"side {side}", refused=side == 1)


@pytest.fixture(scope="module")
def records():
    """Five records, so that the last batch is not full; the second has no picture."""
    made = scenes.records("train", 6)[:5]
    return [dataclasses.replace(r, images=()) if i == 1 else r for i, r in enumerate(made)]


@pytest.fixture(scope="module")
def run(tiny_policy, records):
    def run(judge, folder=None, records=records, config=CONFIG, key=KEY, **options):
        options = {"folder": folder, "progress": False} | options
        return explore(tiny_policy, tiny_policy.params, records, config, judge, key, **options)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """One uninterrupted exploration: its trees, its folder and its judge."""
    folder, judge = tmp_path_factory.mktemp("explore") / "whole", Judge()
    return run(judge, folder), folder, judge


def assert_same(ours, theirs):
    assert [t.trunk.record_id for t in ours] == [t.trunk.record_id for t in theirs]
    for a, b in zip((b for t in ours for b in t.branches), (b for t in theirs for b in t.branches), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.prefix, a.status, a.verdict, a.reason) == (b.prefix, b.status, b.verdict, b.reason)
        assert a.refused == b.refused


def test_every_proper_prefix_has_k_branches_and_answers_alone_are_judged(whole, records, tiny_policy):
    trees, _, judge = whole
    assert [tree.trunk.record_id for tree in trees] == [record.id for record in records]
    branches = [(t, b) for t in trees for b in t.branches]
    for tree in trees:
        assert Counter(b.prefix for b in tree.branches) == dict.fromkeys(range(6), K)
    statuses = Counter(b.status for _, b in branches)
    assert {"ok", "truncated", "no_close", "multiple", "no_open", JUDGE_FAILED} <= statuses.keys()
    assert len(judge.asked) == statuses["ok"] + statuses[JUDGE_FAILED]
    eos = tiny_policy.processor.eos_id
    for _, b in branches:
        stopped = b.tokens[-1] == eos
        assert 1 <= len(b.tokens) == len(b.logprobs) <= BUDGET
        assert stopped or len(b.tokens) == BUDGET
        assert eos not in b.tokens[:-1]
        assert np.isfinite(b.logprobs).all() and (b.logprobs < 0).all()
        assert (b.verdict is not None) == (b.status == "ok")
        assert b.status != "truncated" or not stopped
        assert stopped or b.status not in ("ok", JUDGE_FAILED, "no_close", "empty")
    assert {True, False} <= {b.verdict for _, b in branches}
    assert {True, False, None} == {b.refused for _, b in branches}


def test_the_judge_reads_the_prefix_and_the_branch_as_one_path(whole, records, tiny_policy):
    trees, _, judge = whole
    texts = {record.id: record.steps for record in records}
    expected = [
        (t.trunk.record_id, len(texts[t.trunk.record_id][: b.prefix]))
        for t in trees
        for b in t.branches
        if b.status in ("ok", JUDGE_FAILED)
    ]
    assert [name for name, _, _ in judge.asked] == [name for name, _ in expected]
    # The branch continues the last step's text or opens no further one.
    assert all(found in (n, n + 1) for (_, _, found), (_, n) in zip(judge.asked, expected, strict=True))


def test_chosen_prefixes_alone_are_continued_and_their_branches_stay_what_they_are(whole, run, records):
    """`(0,)` are whole responses from the root; the steps after the last chosen prefix are not even prefilled."""
    for chosen in ((0,), (1, 4)):
        part = run(Judge(), config=dataclasses.replace(CONFIG, prefixes=chosen))
        for ours, theirs in zip(part, whole[0], strict=True):
            wanted = [b for b in theirs.branches if b.prefix in chosen]
            for a, b in zip(ours.branches, wanted, strict=True):
                assert (a.prefix, a.verdict) == (b.prefix, b.verdict)
                np.testing.assert_array_equal(a.tokens, b.tokens)
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


ADAPTIVE = dataclasses.replace(CONFIG, adaptive=2, wave=1, max_age=1)


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory):
    folder, judge = tmp_path_factory.mktemp("adaptive") / "whole", Judge()
    return run(judge, folder, config=ADAPTIVE), folder, judge


def test_adaptive_exploration_is_a_part_of_uniform_exploration_bit_by_bit(adapted, whole):
    trees, _, judge = adapted
    assert_same(trees, [replay(tree, ADAPTIVE.waves()) for tree in whole[0]])
    counts = Counter(n for t in trees for n in Counter(b.prefix for b in t.branches).values())
    assert counts.keys() == {2, K} and len(judge.asked) < len(whole[2].asked)
    assert all({b.verdict for b in t.branches if b.prefix == i} - {None} for t in trees for i in few(t))


def few(tree):
    return [i for i, n in Counter(b.prefix for b in tree.branches).items() if n < K]


@pytest.mark.parametrize(
    ("branch_lines", "verdict_lines"), [(0, 0), (2.5, 0), (5, 2.4), (6.5, None), (None, 3.5), (None, None)]
)
def test_cut_adaptive_exploration_resumes_to_the_same_trees(run, adapted, tmp_path, branch_lines, verdict_lines):
    """Whether the kill came within the first wave (five trees) or a later one."""
    trees, folder, first = adapted
    shutil.copy(folder / "round.json", tmp_path)
    for name, lines in (("branches", branch_lines), ("verdicts", verdict_lines)):
        (tmp_path / f"{name}.jsonl").write_bytes(cut((folder / f"{name}.jsonl").read_bytes(), lines))
    judge = Judge()
    assert_same(run(judge, tmp_path, config=ADAPTIVE), trees)
    lines = [(part / "branches.jsonl").read_bytes().splitlines() for part in (tmp_path, folder)]
    assert sorted(lines[0]) == sorted(lines[1])
    kept = len(first.asked) if verdict_lines is None else int(verdict_lines)
    assert sorted(judge.asked) == sorted(first.asked[kept:])


def test_the_next_round_starts_from_branches_that_are_not_too_old(run, adapted, records, tiny_policy, tmp_path):
    trees, _, _ = adapted
    judge = Judge()
    second = run(judge, tmp_path, config=ADAPTIVE, round_=1, earlier=trees)
    for before, after in zip(trees, second, strict=True):
        old, fresh = ([b for b in after.branches if (b.age == 1) is kind] for kind in (True, False))
        kept = [b for i in range(6) for b in [b for b in before.branches if b.prefix == i][-2:]]  # room for a wave of 1
        assert [(b.prefix, b.tokens.tolist(), b.verdict, b.reason) for b in old] == [
            (b.prefix, b.tokens.tolist(), b.verdict, b.reason) for b in kept
        ]
        split = {i for i in range(6) if len({b.verdict for b in old if b.prefix == i} - {None}) != 1}
        assert Counter(b.prefix for b in fresh) == dict.fromkeys(split, 1) and {b.age for b in fresh} <= {0}
    assert (
        0 < len(judge.asked) == sum(b.age == 0 and b.status in ("ok", JUDGE_FAILED) for t in second for b in t.branches)
    )
    # A round under way is read again without parameters, trees that wanted nothing new included.
    again = explore(
        tiny_policy, None, records, ADAPTIVE, judge, KEY, round_=1, folder=tmp_path, progress=False, earlier=trees
    )
    assert_same(again, second)
    third = run(Judge(), config=ADAPTIVE, round_=2, earlier=second)
    assert {b.age for t in third for b in t.branches} == {0, 1}


@pytest.mark.parametrize("prefixes", [(), (1, 0), (0, 0), (-1,)])
def test_prefixes_that_no_path_has_are_refused(prefixes, run):
    with pytest.raises(ValueError, match="give at least one, from 0 on, ascending"):
        dataclasses.replace(CONFIG, prefixes=prefixes)
    with pytest.raises(ValueError, match=r"explore.prefixes=\(0, 6\), but it has prefixes 0 to 5"):
        run(Judge(), config=dataclasses.replace(CONFIG, prefixes=(0, 6)))


@pytest.mark.parametrize(
    ("branch_lines", "verdict_lines"), [(0, 0), (2.5, 0), (4, 2.4), (4.99, None), (None, 3.5), (0, None), (None, None)]
)
def test_a_cut_folder_resumes_to_the_same_files_and_nothing_is_asked_twice(
    run, whole, tmp_path, branch_lines, verdict_lines
):
    """`2.5`: two lines and half of the third; None: the whole file."""
    trees, folder, first = whole
    shutil.copy(folder / "round.json", tmp_path)
    for name, lines in (("branches", branch_lines), ("verdicts", verdict_lines)):
        (tmp_path / f"{name}.jsonl").write_bytes(cut((folder / f"{name}.jsonl").read_bytes(), lines))
    judge = Judge()
    assert_same(run(judge, tmp_path), trees)
    # Trees are stored as they finish; which finishes first depends on what is left to do, what they are does not.
    lines = [(part / "branches.jsonl").read_bytes().splitlines() for part in (tmp_path, folder)]
    assert sorted(lines[0]) == sorted(lines[1])
    assert (tmp_path / "verdicts.jsonl").read_bytes() == (folder / "verdicts.jsonl").read_bytes()
    kept = len(first.asked) if verdict_lines is None else int(verdict_lines)
    assert judge.asked == first.asked[kept:]


def cut(content: bytes, lines: float | None) -> bytes:
    if lines is None:
        return content
    parts = content.splitlines(keepends=True)
    next_line = parts[int(lines)]
    return b"".join(parts[: int(lines)]) + next_line[: int(len(next_line) * (lines % 1))]


def test_a_judge_that_raises_stops_the_run_which_goes_on_where_it_stopped(run, whole, tmp_path):
    trees, folder, first = whole

    class Broken(Judge):
        def __call__(self, record, path):
            if len(self.asked) == 4:
                raise ConnectionError("no route to host")
            return super().__call__(record, path)

    with pytest.raises(ConnectionError) as error:
        run(Broken(), tmp_path)
    [note] = error.value.__notes__
    assert repr(first.asked[4][0]) in note and "prefix" in note
    judge = Judge()
    assert_same(run(judge, tmp_path), trees)
    assert judge.asked == first.asked[4:]
    assert (tmp_path / "verdicts.jsonl").read_bytes() == (folder / "verdicts.jsonl").read_bytes()


class Crowd(Judge):
    """Answers many questions at a time, the last first; dies after `limit` answers."""

    def __init__(self, limit=10**9):
        super().__init__()
        self.limit = limit

    def batch(self, pairs):
        for count, index in enumerate(reversed(range(len(pairs)))):
            if count == self.limit:
                raise ConnectionError("no route to host")
            yield index, self(*pairs[index])


def test_a_judge_of_many_at_a_time_gives_the_same_trees_and_loses_no_verdict(run, whole, tmp_path):
    trees, _, single = whole
    with pytest.raises(ConnectionError) as error:
        run(Crowd(limit=4), tmp_path)
    assert "kept" in error.value.__notes__[0]
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 4
    crowd = Crowd()
    assert_same(run(crowd, tmp_path), trees)
    assert crowd.asked == single.asked[:-4][::-1]
    assert_same(run(Crowd(limit=0), tmp_path), trees)


def test_a_failed_verdict_is_asked_again_and_an_unknown_one_is_not(run, whole, records, tiny_policy, tmp_path):
    _, _, single = whole

    class Failing(Judge):
        def __call__(self, record, path):
            verdict = super().__call__(record, path)
            return dataclasses.replace(verdict, safe=None, effective=None, refused=None, failed=len(self.asked) < 4)

    again = run(Failing(), tmp_path)
    unknown = [branch.status for tree in again for branch in tree.branches if branch.verdict is None]
    assert unknown.count(JUDGE_FAILED) == len(single.asked)
    judge = Judge()
    # Updates have learned from the round: a restart must not change it.
    explore(tiny_policy, None, records, CONFIG, judge, KEY, folder=tmp_path, progress=False)
    assert judge.asked == []
    run(judge, tmp_path)
    assert judge.asked == single.asked[:3]
    told = run(Judge(), tmp_path)
    assert sum(b.verdict is not None for tree in told for b in tree.branches) > 0


@pytest.mark.parametrize("indices", [[0, 0], [0, 2], [1], [0, 1, 1]])
def test_a_batch_answers_every_question_once(indices, records):
    class Wrong:
        name = "wrong"

        def batch(self, pairs):
            return ((index, None) for index in indices)

    with pytest.raises(ValueError, match=r"wrong\.batch gave (verdict \d twice|no verdict of 1 of 2)"):
        list(ask(Wrong(), [(records[0], None)] * 2))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        True,
        Verdict("no", True, ""),
        Verdict(True, 1, ""),
        Verdict(np.bool_(True), True, ""),
        Verdict(True, True, "", refused=1),
    ],  # type: ignore[arg-type]
)
def test_what_is_no_verdict_is_refused_and_never_counts(run, records, answer):
    with pytest.raises(TypeError, match=r"record 'train-0-0000\d\d', prefix \d.*True, False or None"):
        run(lambda record, path: answer)


@pytest.mark.parametrize(
    ("risky", "mode", "table"),
    [
        # Rows: safe; columns: effective; T, F and ? for unknown.
        (True, "safe_and_effective", {"T": "TF?", "F": "FFF", "?": "?F?"}),
        (True, "safe", {"T": "TTT", "F": "FFF", "?": "???"}),
        (False, "safe_and_effective", {"T": "TF?", "F": "TF?", "?": "TF?"}),
        (False, "safe", {"T": "TF?", "F": "TF?", "?": "TF?"}),
    ],
)
def test_favourable_truth_table(records, risky, mode, table):
    value = {"T": True, "F": False, "?": None}
    record = next(r for r in records if r.risky is risky)
    for safe, row in table.items():
        for effective, expected in zip("TF?", row, strict=True):
            assert is_favourable(record, value[safe], value[effective], mode) is value[expected], (safe, effective)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="favourable='effective'"):
        ExploreConfig(favourable="effective")


def test_paths_of_different_length_share_a_batch(tiny_policy, records):
    """A path of two steps beside one of six: each gets its own prefixes, and the same branches beside another."""
    long, other = (make_trunk(records[i], tiny_policy.processor) for i in (0, 2))
    short = dataclasses.replace(make_trunk(records[1], tiny_policy.processor), record_id="short")
    short = dataclasses.replace(short, ends=short.ends[:3])
    shape = explore_shape(tiny_policy, (short, long, other), CONFIG)

    def sample(*trunks):
        found = sample_trees(tiny_policy, tiny_policy.params, trunks, CONFIG, KEY, shape)
        return sorted(found, key=lambda tree: [t.record_id for t in trunks].index(tree.trunk.record_id))

    first, second = sample(short, long), sample(other, short)
    assert Counter(b.prefix for b in first[0].branches) == {0: K, 1: K}
    assert Counter(b.prefix for b in first[1].branches) == dict.fromkeys(range(6), K)
    assert_same(first[:1], second[1:])


def test_text_alone_and_pictures_share_a_batch(run, whole, records):
    """The text-only record's branches are the same in a batch without any picture, to the last bits of another program."""
    trees, _, _ = whole
    assert trees[1].trunk.encoded.vision is None and trees[0].trunk.encoded.vision is not None
    [alone] = run(Judge(), records=[records[1]])
    for a, b in zip(alone.branches, trees[1].branches, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_branches_follow_the_key_and_the_round(run, whole):
    trees, _, _ = whole
    openings = lambda trees: [b.tokens[:4].tolist() for t in trees for b in t.branches]  # noqa: E731
    for other in (run(Judge(), round_=1), run(Judge(), key=jax.random.key(4))):
        differ = np.mean([a != b for a, b in zip(openings(trees), openings(other), strict=True)])
        assert differ > 0.8
    assert_same(run(Judge()), trees)


def test_records_and_folders_that_do_not_belong_together_are_refused(run, whole, records, tmp_path):
    _, folder, _ = whole
    with pytest.raises(ValueError, match="of other records than those to explore"):
        run(Judge(), config=ADAPTIVE, earlier=whole[0][:3])
    with pytest.raises(ValueError, match=f"not unique.*{records[0].id}"):
        run(Judge(), records=[*records, records[0]])
    with pytest.raises(ValueError, match=r"trees of other records.*another work directory"):
        run(Judge(), folder, records=records[:3])
    changed = [dataclasses.replace(records[0], question="May one rest here?"), *records[1:]]
    with pytest.raises(ValueError, match=f"{records[0].id}.*another trunk"):
        run(Judge(), folder, records=changed)
    [picture] = records[0].images
    repainted = dataclasses.replace(records[0], images=(picture.rotate(180),))  # the same tokens
    with pytest.raises(ValueError, match=f"1 records .{records[0].id}. give another trunk"):
        run(Judge(), folder, records=[repainted, *records[1:]])
    settings = [(name, {"config": dataclasses.replace(CONFIG, **{name: value})}) for name, value in CHANGES.items()]
    for name, options in [*settings, ("round", {"round_": 1}), ("key", {"key": jax.random.key(4)})]:
        with pytest.raises(
            ValueError, match=rf"explored from something else: (explore\.)?{name} is [^;]*; use another"
        ):
            run(Judge(), folder, **options)


CHANGES = {
    "k": 2,
    "temperature": 0.9,
    "top_k": 9,
    "max_tokens": 12,
    "trees": 2,
    "width": 5,
    "prefill": 2,
    "patches": (24,),
    "trunk": (160,),
    "gather": True,
    "int8_cache": True,
}


def test_trees_of_other_parameters_are_never_taken(tiny_policy, whole, records, tmp_path):
    """Not even where all of them are stored. Without parameters the trees are read, and never sampled."""
    trees, folder, _ = whole
    moved = {**tiny_policy.params, "head": tiny_policy.params["head"] * 1.001}
    explored = lambda params, folder: explore(  # noqa: E731
        tiny_policy, params, records, CONFIG, Judge(), KEY, folder=folder, progress=False
    )
    with pytest.raises(ValueError, match=r"something else: parameters is \w+, there \w+; use another"):
        explored(moved, folder)
    assert_same(explored(None, folder), trees)
    shutil.copytree(folder, tmp_path / "cut")
    lines = (folder / "branches.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "branches.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=rf"cut lacks the trees of 1 records.*{records[-1].id}"):
        explored(None, tmp_path / "cut")
    (tmp_path / "cut" / "round.json").unlink()
    with pytest.raises(ValueError, match=r"no round\.json.*another work directory"):
        explored(moved, tmp_path / "cut")


def test_another_judge_is_asked_again(run, whole, tmp_path):
    """Verdicts are kept by judge: the second is asked everything, the first nothing when it comes back."""
    trees, folder, first = whole
    shutil.copytree(folder, tmp_path / "run")

    class Stern(Judge):
        name = "sides-2"

        def __call__(self, record, path):
            return dataclasses.replace(super().__call__(record, path), safe=False)

    stern, back = Stern(), Judge()
    harsh = run(stern, tmp_path / "run", config=dataclasses.replace(CONFIG, favourable="safe"))
    assert stern.asked == first.asked
    risky = [b.verdict for b in harsh[0].branches if b.status == "ok"]
    assert risky and not any(risky)
    assert_same(run(back, tmp_path / "run"), trees)
    assert back.asked == []
    stored = [json.loads(line)["judge"] for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()]
    assert Counter(stored) == {"sides-1": len(first.asked), "sides-2": len(first.asked)}
    assert judge_name(rules.judge) == "srpo_jax.judges.rules:judge"


def test_a_record_that_cannot_be_encoded_is_named(run, records, tmp_path):
    gone = dataclasses.replace(records[0], images=(Path(tmp_path / "gone.png"),))
    with pytest.raises(ValueError, match=rf"{gone.id}.*gone\.png"):
        run(Judge(), records=[gone])
    cramped = dataclasses.replace(CONFIG, trunk=(48, 64))
    with pytest.raises(ValueError, match=rf"{records[0].id}.*explore\.trunk.*exceeds the largest bucket 64"):
        run(Judge(), config=cramped)
    endless = dataclasses.replace(records[0], safe_reply="bake " * 600)
    with pytest.raises(ValueError, match=rf"{endless.id}.*context"):
        run(Judge(), records=[endless])


def test_statistics_are_shares_of_the_branches(tiny_policy, records):
    def tree(index, *branches):
        made = [Branch(0, np.zeros(n, np.int32), np.zeros(n, np.float32), s, v) for n, s, v in branches]
        return ReasoningTree(make_trunk(records[index], tiny_policy.processor), tuple(made))

    trees = [
        tree(0, (4, "ok", True), (6, "ok", False), (8, "truncated", None), (2, JUDGE_FAILED, None)),
        tree(1, (1, "ok", True), (1, "no_close", None), (1, "ok", True), (1, "truncated", None)),
    ]
    risky = {record.id: record.risky for record in records}
    assert risky[records[0].id] and not risky[records[1].id]
    assert exploration_statistics(trees, risky) == {
        "explore/trees": 2,
        "explore/branches": 8,
        "explore/mean_length": 3,
        "explore/truncated": 2 / 8,
        "explore/looped": 0,
        "explore/judge_failed": 1 / 8,
        "explore/unknown": 4 / 8,
        "explore/favourable_risky": 1 / 2,
        "explore/favourable_harmless": 1,
    }
    said = iter([True, None, False, True])
    trees[1] = dataclasses.replace(
        trees[1], branches=tuple(dataclasses.replace(b, refused=next(said)) for b in trees[1].branches)
    )
    trees[0] = dataclasses.replace(
        trees[0], branches=tuple(dataclasses.replace(b, refused=True) for b in trees[0].branches)
    )
    # Of the harmless branches alone, and of those of which the judge tells.
    assert exploration_statistics(trees, risky)["explore/over_refusal"] == 2 / 3
