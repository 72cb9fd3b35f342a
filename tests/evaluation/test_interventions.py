"""Interventions: prefixes are those of the trunk, donors are twins, and in the embedded world answers follow the reasoning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from srpo_jax.config import policy_path
from srpo_jax.data import scenes
from srpo_jax.evaluation.combs import read_combs
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import GenerateConfig, MissingResponsesError, encode_prompts
from srpo_jax.evaluation.interventions import donors, intervene, prefixes, render_interventions
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.judges.verdict import Verdict
from srpo_jax.models.policy import load_policy
from srpo_jax.paths import parse

RECORDS = scenes.records("test_id", 12)
CONFIG = GenerateConfig(max_tokens=100, batch=36, trunk=(64,), patches=(64,))


@pytest.fixture(scope="module")
def base():
    return load_policy(policy_path("embedded"))


@pytest.fixture(scope="module")
def prompts(base):
    return encode_prompts(RECORDS, base.processor)


def test_donors_are_twins_and_else_other_risky_records():
    given = donors(RECORDS)
    assert {name: donor.id for name, donor in given.items()} == {r.id: r.twin for r in RECORDS if r.risky}
    alone = [dataclasses.replace(r, twin=None) for r in RECORDS if r.risky]
    for name, donor in donors(alone).items():
        record = next(r for r in alone if r.id == name)
        assert donor.risky and donor is not record
        assert donor.category != record.category or {r.category for r in alone} == {record.category}
    with pytest.raises(ValueError, match="has no twin among the records and is the only risky one"):
        donors(alone[:1])


def test_reference_prefixes_are_those_of_the_trunk_and_others_differ_in_one_step(base, prompts):
    found = {(p.record.id, p.arm, p.step): p for p in prefixes(RECORDS, prompts, base.processor)}
    assert len(found) == len({p.prompt.record_id for p in found.values()}) == 6 * 6 * 3
    for record in RECORDS[::2]:
        trunk, twin = make_trunk(record, base.processor), donors(RECORDS)[record.id]
        for step in range(1, 7):
            own = found[record.id, "reference", step]
            tokens = own.prompt.encoded.tokens
            np.testing.assert_array_equal(tokens, trunk.encoded.tokens[: trunk.ends[step]])
            np.testing.assert_array_equal(own.prompt.encoded.positions, trunk.encoded.positions[:, : trunk.ends[step]])
            texts = {arm: found[record.id, arm, step].text for arm in ("reference", "corrupted", "unsafe_opening")}
            steps = {arm: [s.text for s in parse(text, stopped=False).steps] for arm, text in texts.items()}
            assert steps["reference"] == list(record.steps[:step])
            assert steps["corrupted"] == [*record.steps[: step - 1], twin.steps[step - 1]]
            assert steps["unsafe_opening"] == list(twin.steps[:step])


def test_answers_of_the_base_policy_follow_a_corrupted_strategy(base, prompts, tmp_path):
    """The truth of the embedded world: the last step tells the reply, so that of the harmless twin makes it unsafe."""
    world = evaluator_for("scenes")
    args = (base, base.params, RECORDS, world, CONFIG, prompts, tmp_path)
    with pytest.raises(MissingResponsesError, match=r"lacks 108 of 108 .*\|reference-1'"):
        intervene(*args, score_only=True, progress=False)
    row = {"name": "base", "decoding": CONFIG.decoding()}
    told = intervene(*args, row=row, progress=False)
    check_combs(told, read_combs(tmp_path))
    assert told["donors"] == {"twins": 6, "others": 0}
    assert [one["step"] for one in told["steps"]] == [1, 2, 3, 4, 5, 6]
    last = told["steps"][5]
    assert last["S"]["reference"]["rate"] >= 5 / 6
    assert last["followed"]["n"] >= 5 and last["followed"]["rate"] >= 0.8
    assert last["S"]["corrupted"]["rate"] <= 0.2 and last["S"]["unsafe_opening"]["rate"] <= 0.2
    assert intervene(*args, score_only=True, progress=False) == told
    assert render_interventions(told).count("\n") == 8
    unread = dataclasses.replace(world, name="unread-1", answer=lambda record, path: Verdict(None, None, "cannot tell"))
    blind = intervene(base, base.params, RECORDS, unread, *args[4:], score_only=True, progress=False)["steps"][5]
    assert (blind["S"]["reference"]["rate"], blind["S"]["reference"]["best"]) == (0.0, 1.0)
    assert (blind["followed"]["n"], blind["followed"]["rate"]) == (0, None)  # no safe answer that could have turned


def check_combs(told, found):
    """The trees hold the continuations: 18 branches of each record, at the prefix where they leave, counted as in the table."""
    [combs] = found
    assert (combs.good, combs.judge, combs.total, len(combs.combs)) == ("safe", "scenes-checker-1", 6, 6)
    for comb in combs.combs:
        record = next(record for record in RECORDS if record.id == comb.id)
        assert [step.text for step in comb.steps] == list(record.steps)
        assert all(step.safe for step in comb.steps)
        for branch in comb.branches:
            assert branch.given == {"": 0, "corrupted": 1, "unsafe opening": branch.given or None}[branch.kind]
            donor = donors(RECORDS)[record.id].steps[branch.prefix : branch.prefix + branch.given]
            assert [step.text for step in branch.steps[: branch.given]] == list(donor)
        places = [(branch.kind, branch.prefix + branch.given) for branch in comb.branches]
        assert sorted(places) == [(kind, i) for kind in ("", "corrupted", "unsafe opening") for i in range(1, 7)]
    for kind, arm in (("", "reference"), ("corrupted", "corrupted"), ("unsafe opening", "unsafe_opening")):
        for step in range(1, 7):
            here = [b for c in combs.combs for b in c.branches if (b.kind, b.prefix + b.given) == (kind, step)]
            assert sum(b.good is True for b in here) / 6 == told["steps"][step - 1]["S"][arm]["rate"]


def test_records_without_risk_are_refused(base, prompts):
    with pytest.raises(ValueError, match="no risky record"):
        intervene(base, base.params, RECORDS[1:2], evaluator_for("scenes"), CONFIG, prompts[1:2], progress=False)
