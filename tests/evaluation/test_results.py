"""No row of `results.json` is lost to another one; verdicts belong to the picture that was judged."""

import dataclasses
import shutil

import numpy as np

from srpo_jax.data import scenes
from srpo_jax.evaluation.evaluators import Evaluator, evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import benchmark_digest, judge_responses
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.results import add_result, read_results, render
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.judges.verdict import StepVerdict, Verdict

RECORDS = scenes.records("test_id", 4)


def entry(name, step, benchmark="one", safe=0.5):
    rate = {"n": 8, "rate": safe, "low": safe / 2, "high": 1.0, "unknown": 0.0, "best": safe}
    return {"name": name, "step": step, "decoding": {"temperature": 0.0}, "benchmark": benchmark, "S": rate}


def test_steps_and_benchmarks_of_one_policy_all_stay(tmp_path):
    path = tmp_path / "results.json"
    rows = [entry("base", 0), entry("run", 50), entry("run", 100), entry("run", 100, "two")]
    for row in rows:
        add_result(path, row)
    assert read_results(path)["evaluations"] == rows
    results = add_result(path, entry("run", 50, safe=0.25))  # in its place
    assert [(e["name"], e["step"], e["S"]["rate"]) for e in results["evaluations"]] == [
        ("base", 0, 0.5),
        ("run", 50, 0.25),
        ("run", 100, 0.5),
        ("run", 100, 0.5),
    ]
    labels = [line.split("|")[1].strip() for line in render(results).splitlines()[2:]]
    assert labels == [
        "base (greedy)",
        "run (greedy) step 50",
        "run (greedy) step 100 benchmark one",
        "run (greedy) step 100 benchmark two",
    ]


def test_what_was_asked_apart_stays_with_the_same_answers_alone(tmp_path):
    path = tmp_path / "results.json"
    row = entry("run", 50) | {"provenance": {"params": "a", "prompts": "b", "device": "one"}}
    found = {"pairwise": {"rows": []}, "interventions": {"n": 3}}
    add_result(path, row | found)
    again = row | {"provenance": {**row["provenance"], "device": "two"}, "S": entry("run", 50, safe=0.25)["S"]}
    assert add_result(path, again)["evaluations"] == [again | found]
    newer = again | {"interventions": {"n": 4}}
    assert add_result(path, newer)["evaluations"] == [newer | {"pairwise": found["pairwise"]}]
    other = row | {"provenance": {**row["provenance"], "params": "c"}}
    assert add_result(path, other)["evaluations"] == [other]


def test_references_of_another_benchmark_stay(tmp_path):
    path, world = tmp_path / "results.json", evaluator_for("scenes")
    for records in (RECORDS, RECORDS[:2], RECORDS[::-1]):
        results = add_result(path, entry("base", 0), reference_rows(records, world))
    found = [(row["name"], row["benchmark"], row["malformed"]["n"]) for row in results["references"]]
    digests = [(benchmark_digest(RECORDS), 4), (benchmark_digest(RECORDS[:2]), 2)]
    assert found == [(name, *d) for d in digests for name in ("refuse everything", "comply with everything")]


def test_verdicts_belong_to_the_picture_not_to_its_place(tmp_path):
    asked = []

    def answer(record, path):
        asked.append(record.id)
        return Verdict(True, True, "")

    evaluator = Evaluator(
        "counts-1", answer, lambda record, path: [StepVerdict(s.number, True, True, "") for s in path.steps]
    )
    first, second = (r.images[0] for r in (RECORDS[0], RECORDS[2]))
    first.save(tmp_path / "a.png")
    record = dataclasses.replace(RECORDS[0], images=(tmp_path / "a.png",))
    response = Response(record.id, 0, np.zeros(0, np.int32), True, "".join(GRAMMAR.render(record.steps, "No.")))

    def judge(record):
        judge_responses([record], [response], evaluator, tmp_path / "store", progress=False)
        return len(asked)

    assert [judge(record), judge(record)] == [1, 1]
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    assert judge(dataclasses.replace(record, images=(tmp_path / "b.png",))) == 1
    second.save(tmp_path / "a.png")
    assert judge(record) == 2
