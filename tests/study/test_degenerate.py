"""Promise: every degenerate end that a policy can come to is told from what it wrote, and an honest policy gives no alarm."""

from __future__ import annotations

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import judge_responses
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.judges import rules
from srpo_jax.judges.verdict import Verdict
from srpo_jax.study.analysis import degenerate
from srpo_jax.study.cells import outcomes

RECORDS = scenes.records("validation", 96)
TRAINING = scenes.records("train", 4)


def honest(record):
    """A quarter of the answers wrong, on either side."""
    return record.unsafe_reply if record.risky and record.meta["index"] % 8 < 2 else record.safe_reply


def row(answer, *, copied=None, cut=0, longer=1.0, steps=lambda record: record.steps):
    """What a study keeps of a policy that answers so."""
    responses = []
    for record in RECORDS:
        text = copied or "".join(GRAMMAR.render(steps(record), answer(record)))
        text = text[: len(text) - cut]
        responses.append(Response(record.id, 0, np.zeros(int(len(text) * longer), np.int32), not cut, text))
    trunks = {"".join(GRAMMAR.render(record.steps, record.safe_reply)).strip() for record in TRAINING}
    return outcomes(judge_responses(RECORDS, responses, evaluator_for("scenes"), progress=False), trunks)


ENDS = {
    "refuses 100% of harmless": {"answer": lambda record: "Sorry, I can not help with this."},
    "1.60 times as long": {"answer": honest, "longer": 1.6},
    "0.50 times as long": {"answer": honest, "longer": 0.5},
    "100% malformed": {"answer": honest, "cut": 5},
    "100% copy a training path": {
        "answer": honest,
        "copied": "".join(GRAMMAR.render(TRAINING[1].steps, TRAINING[1].safe_reply)),
    },
    "% of answers differ": {"answer": lambda record: TRAINING[1].safe_reply, "steps": lambda record: TRAINING[1].steps},
    "fewer harmless requests": {"answer": lambda record: honest(record) if record.risky else "Do as you like."},
}


@pytest.mark.parametrize("told", ENDS)
def test_a_policy_that_ends_so_is_told_from_what_it_wrote(told):
    found = degenerate([row(**ENDS[told])], [row(honest)])
    assert any(told in text for text in found), found


def test_an_honest_policy_gives_no_alarm():
    assert degenerate([row(lambda record: record.safe_reply)], [row(honest)]) == []


def test_a_judge_that_is_exploited_is_told_by_the_one_that_training_never_sees(monkeypatch):
    """A judge with a hole, and a policy that found it: it grants everything and says the magic word."""

    def holed(record, path):
        return Verdict("instead" in path.answer, "instead" in path.answer, "")

    monkeypatch.setattr(rules, "judge", holed)
    found = degenerate([row(lambda record: f"{record.unsafe_reply or record.safe_reply} instead")], [row(honest)])
    assert any("the judge of training sees +100.0% more S&E than the evaluator" in text for text in found), found


def test_a_copied_training_path_is_known_as_the_policy_would_write_it(tiny_policy):
    """The study compares decoded tokens: of a trunk and of a response."""
    trunk = make_trunk(TRAINING[1], tiny_policy.processor)
    text = tiny_policy.processor.decode(trunk.path.tolist())
    assert text.strip() == "".join(GRAMMAR.render(TRAINING[1].steps, TRAINING[1].safe_reply)).strip()
