"""Promise: a judge's liking for a place or for length is found and wins nobody anything; a failure is a status, no score."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax.data.items import Item
from srpo_jax.evaluation.comparison import ComparisonError
from srpo_jax.evaluation.judging import JudgeFailureError
from srpo_jax.evaluation.paired import mcnemar
from srpo_jax.evaluation.pairwise import OUTCOMES, biased, compare_answers, match_answers, render_pairwise
from srpo_jax.evaluation.samples import Sample
from srpo_jax.evaluation.statistics import wilson
from srpo_jax.judges.verdict import AnswerPair, Preference

ITEMS = [Item(f"q{i}", (), f"Question {i}?", i % 2 == 0, None, f"q{i}") for i in range(40)]


def sample(item, answer, number=0):
    plain = {
        "split": None,
        "category": None,
        "images": (),
        "tokens": 1,
        "status": "ok",
        "steps": (),
        "whole_path": False,
    }
    unjudged = dict.fromkeys(("safe", "effective", "refused", "path_safe", "path_effective"))
    told = {"key": f"{item.id} {answer}", "id": item.id, "sample": number, "cluster": item.cluster, "risky": item.risky}
    return Sample(**plain, **unjudged, **told, question=item.question, text=answer or "", answer=answer, reason="")


def arms(ours, theirs):
    """Samples of both policies whose answers are these, prompt by prompt, repeated."""
    return tuple([sample(x, some[i % len(some)]) for i, x in enumerate(ITEMS)] for some in (ours, theirs))


def quality(pair):
    """What a judge sees that looks at the answers alone: the number that they begin with."""
    first, second = (int(text.split()[0]) for text in (pair.first, pair.second))
    return "tie" if first == second else "first" if first > second else "second"


def fair(question, pair):
    return Preference(quality(pair), "by its number")


def compare(ours, theirs, judge, **options):
    return compare_answers(ITEMS, ours, theirs, judge, progress=False, **options)


# Of the 20 risky prompts the policy is better on 10, equal on 5, worse on 5; the same holds of the harmless ones.
PLANTED = arms(
    ["2 a", "2 a", "2 b", "2 b", "1 c", "1 c", "1 d", "1 d"], ["1 a", "1 a", "1 b", "1 b", "1 e", "1 e", "2 d", "2 d"]
)


def test_an_unbiased_judge_gives_the_planted_rates():
    told = compare(*PLANTED, fair)
    assert [(row["aspect"], row["prompts"], row["n"]) for row in told["rows"]] == [
        ("safety", "risky", 20),
        ("helpfulness", "risky", 20),
        ("helpfulness", "harmless", 20),
    ]
    for row in told["rows"]:
        assert row["outcomes"] == {"win": 10, "tie": 5, "loss": 5, "inconsistent": 0, "failed": 0, "unanswered": 0}
        assert (row["win"]["rate"], row["loss"]["rate"], row["consistent"]["rate"]) == (0.5, 0.25, 1.0)
        assert (row["win"]["low"], row["win"]["high"]) == wilson(10, 20)
        assert (row["net"]["value"], row["net"]["p"]) == (0.25, mcnemar(10, 5))
        place = row["position"]
        assert (place["first"], place["p"]) == (0.5, 1.0) and place["low"] < 0.4 < 0.6 < place["high"]
    assert told["judge_failures"] == {"asked": 120, "failed": 0}
    assert biased(told) == []
    assert json.loads(json.dumps(told)) == told
    table = render_pairwise(told).splitlines()
    assert len(table) == 5 and table[2].startswith("| safer | 20 risky (5 tied) | 50.0 [29.9, 70.1] | 25.0 [")


def test_a_judge_of_the_first_place_is_exposed_and_wins_nobody_anything():
    told = compare(*PLANTED, lambda question, pair: Preference("first", "it came first"))
    for row in told["rows"]:
        assert row["outcomes"]["inconsistent"] == 20 and row["win"]["rate"] == row["loss"]["rate"] == 0
        assert row["consistent"]["rate"] == 0
        place = row["position"]
        assert place["first"] == 1 and place["low"] > 0.8 and place["p"] < place["p_holm"] < 0.001
    assert len(biased(told)) == 3
    assert biased(told)[0] == (
        "asked which answer is safer (risky prompts), it prefers the first place 100.0 % of the time"
    )


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_lean_to_one_place_is_found_and_does_not_inflate_the_win_rate(place):
    """The judge sees quality, but of equal answers prefers a place: one order alone would give the policy 75 %, or 50 %."""

    def leaning(question, pair):
        return Preference(place if quality(pair) == "tie" else quality(pair), "")

    told = compare(*PLANTED, leaning)
    matches = match_answers(ITEMS, *PLANTED, leaning, progress=False)
    naive = np.mean([match.orders[0].better == "first" for match in matches])
    assert naive == (0.75 if place == "first" else 0.5)
    for row in told["rows"]:
        assert row["win"]["rate"] == 0.5 and row["loss"]["rate"] == 0.25 and row["outcomes"]["inconsistent"] == 5
        # 20 pairs, 40 preferences: 15 first and 15 second where quality decides, 10 more for the place.
        assert row["position"]["first"] == (0.625 if place == "first" else 0.375)
    everywhere = arms(["1 a"], ["1 b"])
    assert f"prefers the {place} place 100.0 %" in biased(compare(*everywhere, leaning))[0]


CHOICE = st.sampled_from(["first", "second", "tie"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(CHOICE, CHOICE), min_size=len(ITEMS), max_size=len(ITEMS)))
def test_whatever_a_judge_says_exchanging_the_policies_exchanges_wins_and_losses(table):
    ours, theirs = arms(["1 a"], ["1 b"])
    said = {item.id: orders for item, orders in zip(ITEMS, table, strict=True)}

    def judge(question, pair):
        return Preference(said[question.id][pair.first == "1 b"], "")

    matches, back = (match_answers(ITEMS, *x, judge, progress=False) for x in ((ours, theirs), (theirs, ours)))
    mirrored = {"win": "loss", "loss": "win"}
    assert [m.outcome for m in back] == [mirrored.get(m.outcome, m.outcome) for m in matches]
    for match in matches:
        orders = said[match.policy.id]
        assert (match.outcome == "win") == (orders == ("first", "second"))
        assert (match.outcome == "inconsistent") == (
            orders not in {("first", "second"), ("second", "first"), ("tie", "tie")}
        )


def test_missing_answers_win_nothing_and_stay_in_the_total_and_equal_ones_tie_unasked():
    asked = []

    def judge(question, pair):
        asked.append(pair)
        return fair(question, pair)

    ours, theirs = arms([None, None, "1 same", "1 same"], ["1 a", "1 a", "1 same", "1 same"])
    told = compare(ours, theirs, judge)
    assert asked == [] and told["judge_failures"] == {"asked": 0, "failed": 0}
    for row in told["rows"]:
        assert (row["n"], row["outcomes"]["unanswered"], row["outcomes"]["tie"]) == (20, 10, 10)
        assert row["win"]["rate"] == row["loss"]["rate"] == 0 and row["position"] is None
        assert row["consistent"]["n"] == 0
    assert "20 risky (10 tied, 10 unanswered)" in render_pairwise(told)


def test_several_samples_are_one_prompt_and_clusters_stay_whole():
    items = [dataclasses.replace(x, cluster=f"c{i // 4}") for i, x in enumerate(ITEMS)]
    ours = [sample(x, text, k) for x in items for k, text in enumerate(("2 a", "1 b"))]
    theirs = [sample(x, "1 c", k) for x in items for k in (0, 1)]
    told = compare_answers(items, ours, theirs, fair, progress=False)
    row = told["rows"][0]
    assert (row["n"], row["win"]["rate"], row["outcomes"]["win"], row["net"]["n"]) == (20, 0.5, 20, 10)
    with pytest.raises(ComparisonError, match="2 samples here and 1 in the baseline"):
        compare_answers(items, ours, theirs[::2], fair, progress=False)


def test_wins_by_length_are_gone_among_answers_of_like_length():
    ours, theirs = arms(["1 " + 40 * "long", "1 " + 40 * "long", "1 short", "1 short"], ["1 shore", "1 shore"])

    def likes_length(question, pair):
        longer = len(pair.first) - len(pair.second)
        return Preference("tie" if not longer else "first" if longer > 0 else "second", "")

    row = compare(ours, theirs, likes_length)["rows"][0]
    assert row["win"]["rate"] == 0.5
    alike = row["length_matched"]
    assert (alike["n"], alike["win"]["rate"], alike["outcomes"]["tie"]) == (10, 0, 10)


def test_a_failure_is_a_status_and_asked_again_and_nothing_else_is(tmp_path):
    asked, broken = collections.Counter(), {"q2", "q3"}

    def judge(question, pair):
        asked[question.id] += 1
        if question.id in broken and pair.first.startswith("1"):
            return Preference(None, "timeout: nobody there", failed=True)
        return fair(question, pair)

    with pytest.raises(
        JudgeFailureError, match=r"failed on 3 of 120 comparisons \(2.5 %, .* 3 × timeout: nobody there"
    ):
        compare(*PLANTED, judge, folder=tmp_path)
    assert asked.total() == 120
    asked.clear()
    told = compare(*PLANTED, judge, folder=tmp_path, max_judge_failures=0.05)
    assert set(asked) == broken and asked.total() == 3  # the other orders of these are known
    row = told["rows"][0]
    assert row["outcomes"]["failed"] == 1 and told["judge_failures"] == {"asked": 120, "failed": 3}
    assert (row["win"]["rate"], row["win"]["best"], row["loss"]["rate"]) == (0.45, 0.5, 0.3)
    assert row["net"]["value"] == pytest.approx(0.2) and row["net"]["bounds"] == pytest.approx([0.15, 0.25])
    broken.clear()
    assert compare(*PLANTED, judge, folder=tmp_path) == compare(*PLANTED, judge)
    asked.clear()
    compare(*PLANTED, judge, folder=tmp_path)
    assert asked.total() == 0


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    asked = []

    class Judge:
        """Takes many questions at a time, answers them backwards, and breaks down once."""

        name, broken = "many-1", True

        def __call__(self, question, pair):
            raise AssertionError("batch is there")

        def batch(self, pairs):
            for index in reversed(range(len(pairs))):
                if self.broken and len(asked) == 50:
                    raise ConnectionError("gone")
                asked.append(pairs[index])
                yield index, fair(*pairs[index])

    judge = Judge()
    with pytest.raises(ConnectionError):
        compare(*PLANTED, judge, folder=tmp_path)
    judge.broken = False
    told = compare(*PLANTED, judge, folder=tmp_path)
    assert len(asked) == 120 and told["rows"] == compare(*PLANTED, fair)["rows"]
    lines = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 120
    assert {"judge", "record_id", "aspect", "first", "second", "better", "reason", "failed"} <= lines[0].keys()
    other = dataclasses.replace(ITEMS[0], question="What else?")
    changed = [dataclasses.replace(s, question=other.question) if s.id == other.id else s for s in PLANTED[0]]
    base = [dataclasses.replace(s, question=other.question) if s.id == other.id else s for s in PLANTED[1]]
    compare_answers([other, *ITEMS[1:]], changed, base, judge, tmp_path, progress=False)
    assert len(asked) == 124  # the changed question alone, in two aspects and two orders


def test_what_is_no_preference_is_refused():
    with pytest.raises(TypeError, match="returned 'first' on record 'q0'; a judge that compares returns a"):
        compare(*PLANTED, lambda question, pair: "first")
    for wrong in ({"better": None}, {"better": "first", "failed": True}, {"better": "A"}):
        with pytest.raises(ValueError, match="a preference is first, second, tie"):
            Preference(**{"reason": ""} | wrong)
    with pytest.raises(ValueError, match="use one of safety, helpfulness"):
        AnswerPair("beauty", "a", "b")
    with pytest.raises(ValueError, match="without text"):
        AnswerPair("safety", "a", "")
    with pytest.raises(ComparisonError, match="no question for the answers"):
        compare_answers(ITEMS[1:], *PLANTED, fair, progress=False)
    assert {m.outcome for m in match_answers(ITEMS, *PLANTED, fair, progress=False)} <= set(OUTCOMES)


@pytest.mark.slow  # 100 comparisons with resampling
def test_a_judge_that_errs_without_a_side_is_seldom_called_biased():
    """Position's p holds its level, and its interval covers one half, where a judge's errors do not depend on the place."""
    rejected = covered = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)

        def errs(question, pair, draw=draw):
            turned = {"first": "second", "second": "first", "tie": draw.choice(["first", "second", "tie"])}
            true = quality(pair)
            return Preference(str(turned[true]) if draw.random() < 0.3 or true == "tie" else true, "")

        place = compare(*PLANTED, errs)["rows"][0]["position"]
        rejected += place["p"] < 0.05
        covered += place["low"] <= 0.5 <= place["high"]
    assert rejected <= 10 and covered >= 88
