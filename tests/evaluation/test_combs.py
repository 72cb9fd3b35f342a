"""Promise: a drawn tree says what exploration stored, and what its judge said; damaged or missing trees are named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.combs import COMBS, CombsError, explored_combs, read_combs, write_combs
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.files import JsonLines
from srpo_jax.trees import Branch, ReasoningTree

RECORDS = scenes.records("train", 6)
WORLD = evaluator_for("scenes")


def branch(processor, record, prefix, reply, *, ended=True, status="ok"):
    """The rest of the record's path, and a reply."""
    text = "".join(GRAMMAR.render(record.steps, reply)[prefix:])
    tokens = [*processor.tokenize(text), *[processor.eos_id] * ended]
    return Branch(prefix, np.asarray(tokens, np.int32), np.zeros(len(tokens), np.float32), status, None)


@pytest.fixture
def explored(tmp_path, tiny_policy):
    """What `explore` leaves behind: two good branches that are alike, a bad one, one cut, one whose judge failed at first."""
    processor = tiny_policy.processor
    with JsonLines(tmp_path / "branches.jsonl") as trees, JsonLines(tmp_path / "verdicts.jsonl") as verdicts:
        for record in RECORDS:
            good, late = (branch(processor, record, prefix, record.safe_reply) for prefix in (0, 5))
            bad = branch(processor, record, 3, record.unsafe_reply or "No.")
            cut = dataclasses.replace(branch(processor, record, 5, "So", ended=False), status="truncated")
            trees.append(ReasoningTree(make_trunk(record, processor), (good, good, bad, late, cut)).to_json())
            for judge, failed, places in (
                ("other", False, [(0, 0)]),
                ("mine", True, [(5, 0)]),
                ("mine", False, [(0, 0), (0, 1), (5, 0), (3, 0)]),
            ):
                for place in places:
                    told = None if failed else place[0] != 3
                    line = {"record_id": record.id, "prefix": place[0], "number": place[1], "judge": judge}
                    line |= {"safe": told, "effective": told, "refused": None, "reason": f"{judge} says {told}"}
                    verdicts.append(line | ({"failed": True} if failed else {}))
    return tmp_path


def combs_of(explored, processor, **options):
    return explored_combs(explored, RECORDS, processor, explored / "evaluation", title="run", **options)


def test_a_comb_is_the_stored_tree_with_its_verdicts(explored, tiny_policy):
    found = combs_of(explored, tiny_policy.processor, judge_steps=WORLD.steps, step_judge=WORLD.name)
    assert (found.judge, found.total, [comb.id for comb in found.combs]) == ("mine", 6, [r.id for r in RECORDS])
    for record, comb in zip(RECORDS, found.combs, strict=True):
        assert [step.text for step in comb.steps] == list(record.steps)
        assert comb.reply == record.safe_reply
        assert [(b.prefix, b.count, b.good, b.status) for b in comb.branches] == [
            (0, 2, True, "ok"),
            (3, 1, False, "ok"),
            (5, 1, True, "ok"),
            (5, 1, None, "truncated"),
        ]
        for one in comb.branches:
            assert [step.text for step in one.steps] == list(record.steps[one.prefix :])
            assert all(step.safe for step in one.steps) == all(step.safe for step in comb.steps[one.prefix :])
        assert comb.branches[0].answer == record.safe_reply
        assert (comb.branches[3].answer, comb.branches[3].reason) == (None, "")
        assert comb.branches[3].text.endswith("</think>\nSo")


def test_combs_are_written_and_read_and_may_be_a_part(explored, tiny_policy):
    found = combs_of(explored, tiny_policy.processor, limit=2)
    assert (len(found.combs), found.total, found.step_judge) == (2, 6, "")
    assert {record.cluster for record in RECORDS if record.id in {c.id for c in found.combs}} == {found.combs[0].id}
    assert all(step.safe is None for step in found.combs[0].steps)
    write_combs(explored, "run", found)
    assert read_combs(explored) == [found]
    file = explored / COMBS / "run.json"
    for text in ("{", file.read_text().replace('"prefix"', '"prefixes"'), "[]"):
        file.write_text(text)
        with pytest.raises(CombsError, match=r"run\.json: damaged .*make it again"):
            read_combs(explored)


def test_missing_trees_are_named(explored, tiny_policy, tmp_path):
    with pytest.raises(CombsError, match="nowhere holds no trees"):
        combs_of(tmp_path / "nowhere", tiny_policy.processor)
    others = scenes.records("wording", 2)
    with pytest.raises(CombsError, match="holds no tree of these records"):
        explored_combs(explored, others, tiny_policy.processor, explored, title="run")
