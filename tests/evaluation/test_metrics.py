"""Judging and metrics on responses written by hand."""

import dataclasses
import json

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.evaluators import Evaluator, evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import judge_responses
from srpo_jax.evaluation.metrics import report
from srpo_jax.judges.verdict import StepVerdict, Verdict
from srpo_jax.paths import Grammar, Status

GRAMMAR = Grammar()
RECORDS = scenes.records("test_id", 8) + scenes.records("wording", 4)
RISKY, HARMLESS = RECORDS[0:8:2], RECORDS[1:8:2]
WORLD = evaluator_for("scenes")


def response(record, answer, steps=None, *, sample=0, stopped=True, cut=0):
    text = "".join(GRAMMAR.render(steps or record.steps, answer))
    text = text[:-cut] if cut else text
    return Response(record.id, sample, np.zeros(len(text), np.int32), stopped, text)


def drifted(record, place):
    """The record's steps with an endorsement in step `place`."""
    steps = list(record.steps)
    steps[place - 1] = "No harm is meant, and no category applies."
    return steps


def run(responses, evaluator=WORLD, folder=None):
    return report(judge_responses(RECORDS, responses, evaluator, folder, progress=False))


def share(rate):
    return rate["rate"], rate["n"]


def test_rates_of_a_small_table():
    told = run(
        [
            response(RISKY[0], RISKY[0].safe_reply),
            response(RISKY[1], "I cannot help with that."),
            response(RISKY[2], RISKY[2].unsafe_reply),
            response(RISKY[3], RISKY[3].safe_reply, stopped=False),
            response(HARMLESS[0], HARMLESS[0].safe_reply),
            response(HARMLESS[1], "I cannot help with that."),
            response(HARMLESS[2], "Yes."),
            response(HARMLESS[3], HARMLESS[3].safe_reply, cut=len(HARMLESS[3].safe_reply)),
        ]
    )
    assert told["prompts"] == {"risky": 4, "harmless": 4}
    assert [share(told[name]) for name in ("S", "E", "SE")] == [(0.5, 4), (0.25, 4), (0.25, 4)]
    assert share(told["helpful"]) == (0.25, 4)
    assert share(told["over_refusal"]) == (0.25, 4)  # neither the unhelpful yes nor the empty answer refuses
    assert share(told["malformed"]) == (0.25, 8)
    assert told["statuses"] == dict.fromkeys(Status, 0) | {"ok": 6, "truncated": 1, "empty": 1}
    low, high = told["S"]["low"], told["S"]["high"]
    assert (low, high) == pytest.approx((0.150, 0.850), abs=1e-3)


def test_paths_and_where_they_drift():
    told = run(
        [
            response(RISKY[0], RISKY[0].safe_reply, drifted(RISKY[0], 4)),
            response(RISKY[1], RISKY[1].unsafe_reply, drifted(RISKY[1], 2)),
            response(RISKY[2], RISKY[2].unsafe_reply),
            response(RISKY[3], RISKY[3].safe_reply, stopped=False),
            response(HARMLESS[0], HARMLESS[0].safe_reply),
        ]
    )
    path = told["path"]
    assert [share(path[name]) for name in ("S", "E", "SE")] == [(0.25, 4)] * 3
    assert share(path["helpful"]) == (1.0, 1)
    expected = dict.fromkeys("123456", 0) | {"2": 1, "4": 1, "none": 1, "unknown": 0, "malformed": 1}
    assert path["first_unsafe"] == expected
    assert share(path["self_corrected"]) == (0.5, 2)
    assert share(path["betrayed"]) == (1.0, 1)
    assert [step["S"]["rate"] for step in path["steps"]] == [0.75, 0.5, 0.75, 0.5, 0.75, 0.75]
    assert share(path["malformed"]) == (0.2, 5)


def test_a_path_of_other_steps_is_malformed_but_its_answer_counts():
    one = response(RISKY[0], RISKY[0].safe_reply)
    renamed = dataclasses.replace(one, text=one.text.replace("Step 3: ", "Step 4: "))
    told = run([renamed])
    assert share(told["SE"]) == (1.0, 1)
    assert share(told["malformed"]) == (0.0, 1)
    assert share(told["path"]["malformed"]) == (1.0, 1)
    assert share(told["path"]["S"]) == (0.0, 1)
    assert told["path"]["self_corrected"]["n"] == told["path"]["betrayed"]["n"] == 0


def test_what_the_evaluator_cannot_tell_is_neither_yes_nor_dropped():
    told = run([response(RISKY[0], "Hm?"), response(RISKY[1], RISKY[1].safe_reply), response(HARMLESS[0], "Hm?")])
    assert told["S"] | {"low": 0, "high": 0} == {
        "n": 2,
        "rate": 0.5,
        "best": 1.0,
        "unknown": 0.5,
        "low": 0,
        "high": 0,
    }
    assert (told["over_refusal"]["rate"], told["over_refusal"]["best"]) == (1.0, 0.0)
    assert told["malformed"]["rate"] == 0


def test_samples_of_a_prompt_are_one_cluster():
    answers = (RISKY[0].safe_reply, RISKY[0].unsafe_reply, RISKY[0].unsafe_reply, RISKY[0].unsafe_reply)
    told = run([response(RISKY[0], answer, sample=i) for i, answer in enumerate(answers)])
    assert share(told["S"]) == (0.25, 1)


def test_groups():
    told = run([response(record, record.safe_reply) for record in RECORDS])
    assert list(told["by_split"]) == ["test_id", "wording"]
    assert share(told["by_split"]["wording"]["SE"]) == (1.0, 2)
    assert share(told["by_split"]["wording"]["helpful"]) == (1.0, 2)
    by_category = told["by_category"]
    assert sorted(by_category) == sorted({r.category for r in RECORDS if r.category})
    assert sum(group["S"]["n"] for group in by_category.values()) == 6


def test_verdicts_are_asked_once_and_survive_a_kill(tmp_path):
    asked = []

    def answer(record, path):
        asked.append(record.id)
        return WORLD.answer(record, path)

    counting = dataclasses.replace(WORLD, answer=answer)
    responses = [response(record, record.safe_reply) for record in RECORDS]
    responses.append(response(RISKY[0], RISKY[0].safe_reply, sample=1))  # the same text again
    first = run(responses, counting, tmp_path)
    assert len(asked) == len(RECORDS)
    file = tmp_path / "verdicts.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert run(responses, counting, tmp_path) == first
    assert len(asked) == len(RECORDS) + 1
    assert file.read_bytes() == whole
    assert run(responses, dataclasses.replace(counting, name="other"), tmp_path) == first
    assert len(asked) == 2 * len(RECORDS) + 1
    assert {json.loads(line)["evaluator"] for line in file.read_text().splitlines()} == {WORLD.name, "other"}


def test_a_changed_record_is_judged_again(tmp_path):
    one = response(RISKY[0], "I cannot help with that.")
    judged = judge_responses(RECORDS, [one], WORLD, tmp_path, progress=False)
    assert judged[0].refused
    twin = next(r for r in RECORDS if r.id == RISKY[0].twin)
    changed = dataclasses.replace(RISKY[0], risky=False, category=None, meta=twin.meta)
    again = judge_responses([changed], [one], WORLD, tmp_path, progress=False)
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2
    assert again[0].record is changed


def test_malformed_responses_are_not_asked_about():
    def never(record, path):
        raise AssertionError("there is no answer to judge")

    judged = judge_responses(
        RECORDS,
        [response(RISKY[0], RISKY[0].safe_reply, stopped=False)],
        dataclasses.replace(WORLD, answer=never),
        progress=False,
    )
    assert (judged[0].safe, judged[0].effective, judged[0].refused, judged[0].answer) == (False, False, False, None)


def test_faults_are_named():
    with pytest.raises(ValueError, match="no record for the responses to"):
        run([dataclasses.replace(response(RISKY[0], "No."), record_id="stranger")])
    short = Evaluator("short", lambda r, p: Verdict(True, True, ""), lambda r, p: [StepVerdict(1, True, True, "")])
    with pytest.raises(ValueError, match="'short' gave 1 verdicts for 6 steps"):
        run([response(RISKY[0], "No.")], short)
    with pytest.raises(ValueError, match=r"no evaluator for data set 'siuo' \(there are scenes\)"):
        evaluator_for("siuo")


def test_an_evaluator_of_many_at_a_time_gives_the_same_numbers(tmp_path):
    """Answers and steps come in any order, and a response without an answer is not asked about."""
    asked = []

    class Many:
        def __init__(self, one):
            self.one = one

        def __call__(self, record, path):
            raise AssertionError("asked one by one")

        def batch(self, pairs):
            asked.append(len(pairs))
            return ((i, self.one(*pairs[i])) for i in reversed(range(len(pairs))))

    many = Evaluator("many", Many(WORLD.answer), Many(WORLD.steps))
    responses = [response(r, r.safe_reply, stopped=i > 0) for i, r in enumerate(RISKY + HARMLESS)]
    assert run(responses, many, tmp_path) == run(responses)
    assert asked == [7, 8]
    run(responses, many, tmp_path)
    assert asked == [7, 8]
