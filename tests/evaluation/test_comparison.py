"""Promise: samples hold all that a report needs, and a comparison never compares what is not the same."""

import dataclasses
import io
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.comparison import METRICS, ComparisonError, compare
from srpo_jax.evaluation.evaluate import evaluate
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import GenerateConfig, Response
from srpo_jax.evaluation.judging import judge_responses
from srpo_jax.evaluation.metrics import report
from srpo_jax.evaluation.paired import holm, mcnemar
from srpo_jax.evaluation.samples import (
    THUMBNAIL,
    THUMBNAIL_BYTES,
    SamplesError,
    read_samples,
    samples_name,
    thumbnail,
    write_samples,
)
from srpo_jax.exploration.trunks import GRAMMAR

RECORDS = scenes.records("test_id", 24) + scenes.records("wording", 24)
WORLD = evaluator_for("scenes")


def answered(replies, sample=0):
    """Judged turns with the reference path and these replies, one per record."""
    responses = [
        Response(r.id, sample, np.arange(3), True, "".join(GRAMMAR.render(r.steps, reply)))
        for r, reply in zip(RECORDS, replies, strict=True)
    ]
    return judge_responses(RECORDS, responses, WORLD, progress=False)


def comply(record):
    return record.unsafe_reply if record.risky else record.safe_reply


@pytest.fixture
def judged():
    """A policy that is right, and one that follows every request on the first half of the records."""
    right = answered([r.safe_reply for r in RECORDS])
    half = answered([comply(r) if i < 24 else r.safe_reply for i, r in enumerate(RECORDS)])
    return right, half


def through_disk(tmp_path, judged, name="one"):
    write_samples(tmp_path, name, judged)
    return read_samples(tmp_path, name)


def test_samples_come_back_with_everything(tmp_path, judged):
    samples = through_disk(tmp_path, judged[1])
    for sample, one in zip(samples, judged[1], strict=True):
        assert (sample.id, sample.question, sample.risky) == (one.record.id, one.record.question, one.record.risky)
        assert (sample.text, sample.answer) == (one.response.text, one.path.answer)
        assert (sample.safe, sample.effective, sample.refused) == (one.safe, one.effective, one.refused)
        assert [s.text for s in sample.steps] == [s.text for s in one.path.steps]
        picture = PIL.Image.open(tmp_path / "samples" / sample.images[0])
        assert max(picture.size) <= THUMBNAIL
    assert len({sample.cluster for sample in samples}) == len(samples) / 2  # twins hang together


def test_a_sample_keeps_its_key_whoever_judges(tmp_path, judged):
    keys = [s.key for s in through_disk(tmp_path, judged[0])]
    lenient = dataclasses.replace(WORLD, name="other-1", steps=lambda record, path: WORLD.steps(RECORDS[0], path))
    again = judge_responses(RECORDS, [one.response for one in judged[0]], lenient, progress=False)
    assert [s.key for s in through_disk(tmp_path, again)] == keys
    assert len({*keys, *(s.key for s in through_disk(tmp_path, judged[1]))}) > len(keys)


def test_a_missing_picture_is_told_and_a_large_one_bounded(tmp_path):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1400, 3), np.uint8))
    data = thumbnail(noise)
    assert len(data) <= THUMBNAIL_BYTES
    assert max(PIL.Image.open(io.BytesIO(data)).size) <= THUMBNAIL
    record = dataclasses.replace(RECORDS[0], images=(tmp_path / "gone.png",))
    response = Response(record.id, 0, np.arange(3), True, "no path")
    [sample] = through_disk(tmp_path, judge_responses([record], [response], WORLD, progress=False))
    assert sample.images == (None,)


def test_lost_or_damaged_samples_are_named(tmp_path, judged):
    write_samples(tmp_path, "one", judged[0][:2])
    with pytest.raises(SamplesError, match=r"two\.json: no samples"):
        read_samples(tmp_path, "two")
    path = tmp_path / "samples" / "one.json"
    path.write_text(path.read_text().replace('"question"', '"Question"'))
    with pytest.raises(SamplesError, match=r"one\.json: damaged"):
        read_samples(tmp_path, "one")


def test_an_evaluation_leaves_samples_and_tells_its_origin(policy, tmp_path):
    config = GenerateConfig(max_tokens=4, batch=4, trunk=(64,))
    entry = evaluate(
        policy, policy.params, RECORDS[:4], WORLD, config, tmp_path, training_judge="rules", progress=False
    )
    assert len(read_samples(tmp_path, samples_name(entry))) == 4
    told = entry["provenance"]
    assert told["training_judge"] == "rules"
    assert told["params"] in (tmp_path / "responses.jsonl").read_text()
    assert {"python", "jax", "flax", "srpo_jax"} <= told["versions"].keys()
    shutil.rmtree(tmp_path / "samples")
    evaluate(policy, policy.params, RECORDS[:4], WORLD, config, tmp_path, progress=False)  # made again from the stores
    assert len(read_samples(tmp_path, samples_name(entry))) == 4


def test_a_comparison_tells_what_the_rates_tell(tmp_path, judged):
    right, half = (through_disk(tmp_path, x) for x in judged)
    found = compare(right, half, names=("right", "half"))
    rates = [report(x) for x in judged]
    for metric in METRICS:
        one = found["metrics"][metric.name]
        told = [r["path"]["S"] if metric.name == "path.S" else r[metric.name] for r in rates]
        assert (one["policy"], one["baseline"]) == (told[0]["rate"], told[1]["rate"])
    risky = found["metrics"]["SE"]
    assert (len(risky["flips"]["up"]), risky["flips"]["down"]) == (12, [])
    assert risky["p"] == mcnemar(12, 0)
    assert risky["method"].startswith("McNemar")
    assert (
        found["metrics"]["over_refusal"]["non_inferiority"] == "inconclusive"
    )  # 24 prompts show nothing within 3 points
    assert found["verdict"].startswith("right gives 50.0 points more answers that are safe and effective than half")
    splits = [group["S"] for group in found["by_split"].values()]
    assert [one["p_holm"] for one in splits] == holm([one["p"] for one in splits])
    assert json.loads(json.dumps(found)) == found
    same = compare(right, right, names=("right", "itself"))
    assert "does not differ measurably" in same["verdict"]
    assert same["metrics"]["SE"]["value"] == 0


def test_several_samples_of_a_prompt_are_one_cluster(tmp_path, judged):
    right, half = judged
    ours = through_disk(tmp_path, [*right, *answered([r.safe_reply for r in RECORDS], 1)])
    theirs = through_disk(tmp_path, [*half, *answered([r.safe_reply for r in RECORDS], 1)])
    one = compare(ours, theirs, names=("a", "b"))["metrics"]["S"]
    assert (one["prompts"], one["n"], one["value"]) == (24, 24, 0.25)
    assert "cluster" in one["method"]


def test_what_is_unknown_counts_against_its_policy_and_widens_the_bounds(tmp_path, judged):
    samples = through_disk(tmp_path, judged[0])
    unknown = [dataclasses.replace(s, safe=None) if s.risky and i < 8 else s for i, s in enumerate(samples)]
    one = compare(unknown, samples, names=("a", "b"))["metrics"]["S"]
    assert one["value"] == pytest.approx(-4 / 24)
    assert one["bounds"] == pytest.approx([-4 / 24, 0])


def test_other_prompts_are_not_compared(tmp_path, judged):
    samples = through_disk(tmp_path, judged[0])
    with pytest.raises(ComparisonError, match="by one policy alone"):
        compare(samples, samples[1:], names=("a", "b"))
    other = [dataclasses.replace(samples[0], question="What else?"), *samples[1:]]
    with pytest.raises(ComparisonError, match="is another one in the baseline"):
        compare(samples, other, names=("a", "b"))


def test_an_effect_is_looked_for_again_among_answers_of_like_length(tmp_path):
    """A judge that likes length: the policy's gain is all in answers that are twice as long, and gone among the others."""
    own = through_disk(tmp_path, answered([r.safe_reply for r in RECORDS]))
    risky = [s for s in own if s.risky]
    longer = {s.id for s in risky[: len(risky) // 2]}
    ours = [dataclasses.replace(s, answer=2 * s.answer) if s.id in longer else s for s in own]
    theirs = [dataclasses.replace(s, safe=False) if s.id in longer else s for s in own]
    found = compare(ours, theirs, names=("long", "short"))
    assert found["metrics"]["SE"]["value"] == 0.5 and found["metrics"]["SE"]["p"] < 0.05
    alike = found["length_matched"]["SE"]
    assert (alike["prompts"], alike["value"], alike["flips"]) == (len(risky) - len(longer), 0, {"up": [], "down": []})
    assert found["length_matched"]["helpful"]["prompts"] == sum(not s.risky for s in own)
    mute = [dataclasses.replace(s, answer=None) for s in own]
    assert compare(mute, theirs, names=("mute", "short"))["length_matched"] == {}
