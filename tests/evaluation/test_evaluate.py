"""The face, the results file and its tables."""

import dataclasses
import json

import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation import evaluators
from srpo_jax.evaluation.evaluate import evaluate
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import GenerateConfig, encode_prompts
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.results import ResultsError, add_result, read_results, render
from srpo_jax.trees import PATCHES

RECORDS = scenes.records("test_id", 4) + scenes.records("combination", 4)
WORLD = evaluator_for("scenes")
CONFIG = GenerateConfig(temperature=1.0, samples=2, max_tokens=12, batch=4, trunk=(64,))


def entry(name="base", temperature=0.0, safe=0.5):
    rate = {"n": 8, "rate": safe, "low": safe / 2, "high": 1.0, "unknown": 0.0, "best": safe}
    rates = dict.fromkeys(("S", "E", "SE", "helpful", "over_refusal", "malformed"), rate)
    return {"name": name, "decoding": {"temperature": temperature}, **rates, "by_split": {"unseen": rates}}


def test_evaluate_end_to_end_and_again(policy, tmp_path):
    first = evaluate(policy, policy.params, RECORDS, WORLD, CONFIG, tmp_path, name="tiny", step=7, progress=False)
    assert (first["name"], first["step"], first["evaluator"]) == ("tiny", 7, WORLD.name)
    assert first["decoding"] == {**CONFIG.decoding(), "samples": 2}
    assert first["prompts"] == {"risky": 4, "harmless": 4}
    assert first["malformed"]["rate"] == 1.0  # random weights do not write the grammar
    assert first["S"]["rate"] == first["helpful"]["rate"] == first["over_refusal"]["rate"] == 0.0
    assert 1 <= first["length"] <= 12
    assert sum(first["statuses"].values()) == 16
    prompts = encode_prompts(RECORDS, policy.processor)
    again = evaluate(
        policy, policy.params, RECORDS, WORLD, CONFIG, name="tiny", step=7, prompts=prompts, progress=False
    )
    assert again == first
    assert json.loads(json.dumps(first)) == first
    with pytest.raises(ValueError, match="not those of the records"):
        evaluate(policy, policy.params, RECORDS, WORLD, CONFIG, prompts=prompts[1:])
    with pytest.raises(ValueError, match="no records"):
        evaluate(policy, policy.params, [], WORLD, CONFIG)


def test_reference_rows_come_from_the_evaluator():
    refuse, comply = reference_rows(RECORDS, WORLD)
    rates = ("S", "E", "helpful", "over_refusal", "malformed")
    assert [refuse[name]["rate"] for name in rates] == [1, 0, 0, 1, 0]
    assert [comply[name]["rate"] for name in rates] == [0, 0, 1, 0, 0]
    blind = dataclasses.replace(WORLD, answer=lambda record, path: WORLD.answer(RECORDS[0], path))
    assert reference_rows(RECORDS, blind)[1]["helpful"]["rate"] == 0
    assert "path" not in refuse
    assert "path" not in comply["by_split"]["combination"]
    bare = [dataclasses.replace(record, unsafe_reply=None) for record in RECORDS]
    refuse, comply = reference_rows(bare, WORLD)
    risky = sum(record.risky for record in bare)
    assert (refuse["S"]["rate"], comply["not_computed"]) == (1, f"the unsafe_reply of {risky} risky records is missing")
    told = render({"evaluations": [], "references": [refuse, comply]})
    assert f"comply with everything: not computed, because the unsafe_reply of {risky} risky" in told


def test_results_keep_order_and_replace_in_place(tmp_path):
    path = tmp_path / "new" / "results.json"
    for one in (entry("base"), entry("base", 1.0), entry("SRPO")):
        add_result(path, one)
    results = add_result(path, entry("base", 1.0, safe=0.25), [entry("refuse everything")])
    assert results == read_results(path) == json.loads(path.read_text())
    assert [(e["name"], e["decoding"]["temperature"]) for e in results["evaluations"]] == [
        ("base", 0.0),
        ("base", 1.0),
        ("SRPO", 0.0),
    ]
    assert [e["S"]["rate"] for e in results["evaluations"]] == [0.5, 0.25, 0.5]
    assert [e["name"] for e in results["references"]] == ["refuse everything"]
    assert add_result(path, entry("SRPO"))["references"] == results["references"]


@pytest.mark.parametrize("text", ["{", "[]", '{"evaluations": [1]}', '{"evaluations": [{"name": "base"}]}'])
def test_a_file_that_is_something_else_is_left_alone(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json.*repair it or move it away"):
        add_result(path, entry())
    assert path.read_text() == text


def test_tables():
    results = {
        "evaluations": [entry("base"), entry("a|b", 0.7, 0.125)],
        "references": [entry("refuse everything") | {"decoding": {}}],
    }
    results["evaluations"][0]["E"] = {"n": 0, "rate": None, "low": None, "high": None, "unknown": None, "best": None}
    results["evaluations"][1]["E"] = results["evaluations"][1]["E"] | {"unknown": 0.05}
    whole, part = render(results).split("**unseen**")
    lines = whole.strip().splitlines()
    assert len({len(line) for line in lines}) == 1
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["policy", "S", "E", "S&E", "harmless helpful", "over-refusal", "malformed"]
    assert lines[2].startswith("| base (greedy)")
    assert "| 50.0 [25.0, 100.0] | – " in lines[2]
    assert "a\\|b (T=0.7)" in lines[3]
    assert "12.5 [6.2, 100.0] (5.0 unknown)" in lines[3]
    assert lines[4].startswith("| refuse everything ")
    assert len(part.strip().splitlines()) == 5
    assert "**" not in render(results, splits=False)


def test_the_section_gives_benchmark_evaluator_and_decodings():
    config = evaluation.default_config()
    config.update(name="scenes", n=2, samples=3, max_tokens=50, seed=5, trunk=[64])
    assert [r.meta["split"] for r in evaluation.build_benchmark(config)][::2] == list(evaluation.HELD_OUT)
    assert evaluation.build_evaluator(config) is WORLD
    greedy, sampled = evaluation.decodings(config)
    assert (greedy.temperature, greedy.samples, sampled.temperature, sampled.samples) == (0.0, 1, 1.0, 3)
    assert (sampled.max_tokens, sampled.seed, sampled.trunk, sampled.patches) == (50, 5, (64,), PATCHES)


def test_an_evaluator_of_your_own(monkeypatch):
    mine = dataclasses.replace(WORLD, name="mine")
    monkeypatch.setattr(evaluators, "MINE", mine, raising=False)
    config = evaluation.default_config()
    config.evaluator = "srpo_jax.evaluation.evaluators:MINE"
    assert evaluation.build_evaluator(config) is mine
    config.evaluator = "srpo_jax.evaluation.evaluators:EVALUATORS"
    with pytest.raises(evaluation.EvalConfigError, match="a dict, not a function"):
        evaluation.build_evaluator(config)


@pytest.mark.parametrize(
    ("field", "value", "build", "message"),
    [
        ("temperatures", (), evaluation.decodings, "temperatures is empty"),
        ("samples", 0, evaluation.decodings, r"config\.eval: samples"),
        ("name", "siuo", evaluation.build_benchmark, "name='siuo'"),
        ("name", "jsonl", evaluation.build_benchmark, "path=''"),
        ("name", "jsonl", evaluation.build_evaluator, "evaluator is empty: no evaluator for data set 'jsonl'"),
        ("splits", ("nowhere",), evaluation.build_benchmark, "unknown split 'nowhere'"),
        ("evaluator", "no.such:thing", evaluation.build_evaluator, "no 'package.module:function'"),
        ("evaluator", "nonsense", evaluation.build_evaluator, "no 'package.module:function'"),
    ],
)
def test_sections_that_cannot_be_used(field, value, build, message):
    config = evaluation.default_config()
    config.name = "scenes"
    config[field] = value
    with pytest.raises(ValueError, match=message):
        build(config)
