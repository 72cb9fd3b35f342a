"""Promise: the processes of a job judge shares of the responses, know all verdicts, and ask nobody twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("jobs", Path(__file__).parents[1] / "jobs.py")
jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(jobs)

COUNT = 11
SCRIPT = f"""
import dataclasses
import json
from pathlib import Path

import numpy as np

from srpo_jax import cli, distributed
from srpo_jax.data import scenes
from srpo_jax.evaluation.evaluators import Evaluator, evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import check_failures, judge_responses
from srpo_jax.evaluation.pairwise import compare_answers
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.samples import read_samples, write_samples
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.judges import Preference, Verdict

RECORDS = scenes.records("test_id", 12)[:{COUNT}]
WORLD = evaluator_for("scenes")


def answer(record, path):
    with open(f"asked-{{distributed.process_index()}}", "a") as file:
        file.write(json.dumps([record.id, path.answer]) + "\\n")
    if Path("down").exists() and record.id in (RECORDS[2].id, RECORDS[9].id):
        return Verdict(None, None, "timeout", failed=True)
    return WORLD.answer(record, path)


def longer(record, pair):
    with open(f"compared-{{distributed.process_index()}}", "a") as file:
        file.write(json.dumps([record.id, pair.aspect, pair.first, pair.second]) + "\\n")
    return Preference("first" if len(pair.first) > len(pair.second) else "second", "length")


def main(_):
    evaluator = Evaluator("counted-1", answer, WORLD.steps)
    texts = ["".join(GRAMMAR.render(r.steps, r.safe_reply)) for r in RECORDS]
    responses = [Response(r.id, 0, np.zeros(0, np.int32), True, t) for r, t in zip(RECORDS, texts, strict=True)]
    judged = judge_responses(RECORDS, responses, evaluator, "store", progress=False)
    told = [[one.record.id, one.safe, one.effective, one.failed, [s.safe for s in one.steps]] for one in judged]
    rows = reference_rows(RECORDS, evaluator, "store")
    distributed.on_lead(lambda: write_samples("store", "ours", judged))
    ours = read_samples("store", "ours")
    theirs = [dataclasses.replace(s, answer=s.answer[::2]) for s in ours]
    rows.append({{"name": "pairwise", "S": compare_answers(RECORDS, ours, theirs, longer, "store", progress=False)}})
    found = {{"judged": told, "failures": check_failures(judged, 1.0), "rows": [[r["name"], r.get("S")] for r in rows]}}
    Path(f"told-{{distributed.process_index()}}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
"""


def judge(home, count):
    """What every process was told, whom they asked about, and which answers each had compared."""
    for path in [*home.glob("asked-*"), *home.glob("told-*"), *home.glob("compared-*")]:
        path.unlink()
    jobs.run(home, count, home / "judge.py")
    told = [json.loads((home / f"told-{i}.json").read_text()) for i in range(count)]
    asked, compared = (
        [path.read_text().splitlines() for path in sorted(home.glob(f"{name}-*"))] for name in ("asked", "compared")
    )
    return told, asked, compared


@pytest.mark.slow
def test_two_processes_judge_as_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "judge.py").write_text(SCRIPT)
    [alone], [asked], [compared] = judge(tmp_path / "one", 1)
    assert alone["failures"] == {"asked": COUNT, "failed": 0}
    assert len(asked) == 3 * COUNT  # the responses, and those of the two reference rows

    two = tmp_path / "two"
    (two / "down").touch()
    told, shares, comparisons = judge(two, 2)
    assert len(comparisons) == 2 and sorted(comparisons[0] + comparisons[1]) == sorted(compared)
    assert alone["rows"][-1][1]["rows"][0]["win"]["rate"] == 1
    assert told[0] == told[1] and told[0]["failures"] == {"asked": COUNT, "failed": 2}
    assert len(shares) == 2 and all(len(share) >= COUNT for share in shares)
    assert sorted(shares[0] + shares[1]) == sorted(asked)  # nothing twice, nothing left out

    (two / "down").unlink()
    told, shares, comparisons = judge(two, 2)
    assert comparisons == []
    again = [json.loads(line)[0] for share in shares for line in share]
    assert told == [alone, alone]
    assert {name for name, *_, failed, _ in alone["judged"] if failed} == set()
    assert len(set(again)) == 2 and len(again) <= 6  # those that failed alone, of responses and reference rows
    assert judge(two, 1) == ([alone], [], [])  # another number of processes asks nobody
