"""The demonstrations behind the base policy: pure by index, imperfect in the documented way."""

from __future__ import annotations

import collections
import functools

import pytest

from srpo_jax.data import scenes
from srpo_jax.data.world.demonstrations import POINTS, Demonstration
from srpo_jax.data.world.language import PRESUPPOSING_FORMS
from srpo_jax.judges.rules import judge, judge_steps
from srpo_jax.judges.verdict import Verdict
from srpo_jax.paths import Grammar, parse

N = 3840


@functools.cache
def judged() -> list[tuple[Demonstration, Verdict]]:
    return [(d, judge(d.record, parsed(d))) for d in scenes.demonstrations(0)[:N]]


def parsed(d: Demonstration):
    return parse("".join(Grammar().render(d.steps, d.reply)), stopped=True)


def share(rows, test) -> float:
    return sum(map(test, rows)) / len(rows)


def unsafe(row) -> bool:
    return row[1].safe is False


def test_an_entry_depends_on_its_index_only():
    first, second = scenes.demonstrations(4), scenes.demonstrations(4)
    backwards = [first[i] for i in (30, 7, 2)]
    for ours, i in zip(backwards, (30, 7, 2), strict=True):
        theirs = second[i]
        assert (ours.steps, ours.reply, ours.onset, ours.record.id) == (
            theirs.steps,
            theirs.reply,
            theirs.onset,
            theirs.record.id,
        )
        assert ours.record.images[0].tobytes() == theirs.record.images[0].tobytes()
    assert (
        scenes.demonstrations(5)[7].record.question != first[7].record.question
        or first[7].steps != scenes.demonstrations(5)[7].steps
    )
    assert len(first) > 10**9
    with pytest.raises(IndexError):
        first[len(first)]


def test_about_half_of_the_risky_ones_end_unsafe_and_most_harmless_ones_help():
    risky = [row for row in judged() if row[0].record.risky]
    harmless = [row for row in judged() if not row[0].record.risky]
    assert all(verdict.safe is not None for _, verdict in judged())
    assert 0.44 < share(risky, unsafe) < 0.56
    assert 0.05 < share(risky, lambda row: row[1].safe and not row[1].effective) < 0.2
    assert share(harmless, unsafe) < 0.01  # A misread picture can make the alternative a risky one.
    assert 0.02 < share(harmless, lambda row: row[1].refused) < 0.06
    assert 0.8 < share(harmless, lambda row: row[1].effective) < 0.95


def test_drift_depends_on_what_makes_the_item_distracting():
    risky = [row for row in judged() if row[0].record.risky]
    causes = {
        "cue": lambda row: row[0].record.meta["cue"] is not None,
        "form": lambda row: row[0].record.meta["form"] in PRESUPPOSING_FORMS,
        "faint state": lambda row: row[0].record.meta["hard"],
    }
    for name, cause in causes.items():
        with_it = share([row for row in risky if cause(row)], unsafe)
        without = share([row for row in risky if not cause(row)], unsafe)
        assert with_it > without + 0.05, (name, with_it, without)


def test_drift_starts_at_every_point_and_lasts():
    onsets = collections.Counter(d.onset for d, _ in judged() if d.onset)
    assert set(onsets) == set(range(1, POINTS + 1))
    assert min(onsets.values()) > 0.3 * max(onsets.values())
    recovered = [verdict.safe for d, verdict in judged() if d.onset and d.onset < 4]
    assert 0.03 < sum(recovered) / len(recovered) < 0.4  # Some recover, most do not.


def test_step_verdicts_agree_with_the_process():
    for d, _ in judged()[:400]:
        steps = judge_steps(d.record, parsed(d))
        assert all(step.safe is not None for step in steps)
        if d.record.risky and not d.misread:
            first = next((step.number for step in steps if not step.safe), None)
            assert first == (d.onset if d.onset != POINTS else None)


def test_without_drift_demonstrations_are_as_good_as_references():
    calm = scenes.demonstrations(0, scenes.Difficulty(drift=0))[:200]
    for d in calm:
        verdict = judge(d.record, parsed(d))
        assert (verdict.safe, verdict.effective) == (True, True)
        assert d.onset is None
        assert not d.misread
