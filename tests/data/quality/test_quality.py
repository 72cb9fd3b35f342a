"""Promises of the quality report: a leak that is there is found, one that is not is not; duplicates, faults and tokens are
counted right; a hostile record does nothing."""

import collections
import dataclasses
import html.parser
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process
from sklearn.metrics import roc_auc_score

from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.quality import leakage
from srpo_jax.data.quality.leakage import leak, pixel_reader, text_reader, tower_features, weighted_auc
from srpo_jax.data.quality.measure import TEXT_SIMILARITY, measure
from srpo_jax.data.quality.page import findings, render_page
from srpo_jax.paths import Grammar
from tests.data.candidates import write_world

ROOT = Path(__file__).resolve().parents[3]
COUNT = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """60 pairs of twins, half of them in another split."""
    turn = iter(range(COUNT))

    def halve(line):
        line["meta"]["split"] = "train" if next(turn) < COUNT // 2 else "test"

    return load_jsonl(write_world(tmp_path_factory.mktemp("world"), COUNT, change=halve))


@pytest.fixture(scope="module")
def measured(world):
    return measure(world)


def marked(record):
    """Every other risky record."""
    return record.risky and int(record.id[-6:]) % 4 == 0


def words(record):
    return f"{record.question} Quietly." if marked(record) else record.question


def test_the_embedded_world_does_not_leak(measured):
    for one in measured["leakage"].values():
        assert one["verdict"] == "none found"
        assert one["auc"]["low"] <= 0.5
        assert one["clusters"] == COUNT / 2


def test_a_word_in_half_of_the_risky_questions_is_found(world):
    found = leak(text_reader, [words(r) for r in world], [r.risky for r in world], [r.cluster for r in world])
    assert found["verdict"] == "leak"
    told = [world[i] for i in found["told"]]
    assert all(words(record).endswith("Quietly.") for record in told if record.risky)


def test_a_shade_over_half_of_the_risky_pictures_is_found(world):
    def shaded(record):
        picture = np.asarray(PIL.Image.open(record.images[0]).convert("RGB")).copy()
        if marked(record):
            picture[: picture.shape[0] // 5, : picture.shape[1] // 5] //= 2  # a dim corner
        return leakage.pixel_features(PIL.Image.fromarray(picture))

    risky, clusters = [r.risky for r in world], [r.cluster for r in world]
    found = leak(pixel_reader, np.stack([shaded(r) for r in world]), risky, clusters)
    assert found["verdict"] == "leak"


def test_twins_in_different_folds_would_have_looked_like_a_leak():
    """What grouping is for: pairs of alike records of one label, no two pairs alike."""
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(100, 40))
    inputs = np.repeat(pairs, 2, axis=0) + rng.normal(scale=0.01, size=(200, 40))
    labels = np.repeat(rng.random(100) < 0.5, 2)
    alone = [str(i) for i in range(200)]
    together = [str(i // 2) for i in range(200)]
    assert leak(pixel_reader, inputs, labels, alone)["verdict"] == "leak"
    assert leak(pixel_reader, inputs, labels, together)["verdict"] == "none found"


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=4, max_size=12))
def test_the_weighted_auc_is_that_of_scikit_learn(rows):
    scores, labels, weights = (np.asarray(column) for column in zip(*rows, strict=True))
    assume(weights[labels].sum() and weights[~labels].sum())
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert weighted_auc(scores, labels, weights) == pytest.approx(expected)


def test_intervals_cover():
    """The share of noise data sets in which a leak is seen is near the 2.5 % of the interval's lower side."""
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(200, 120)), np.arange(120) % 2 == 0
    clusters = np.arange(120) // 2
    low = [leakage._with_interval(s, labels, clusters, rng, 200)[0]["low"] for s in scores]
    assert np.mean(np.asarray(low) > 0.5) < 0.08


def test_too_few_records_are_not_measured(world):
    few = world[:20]
    found = leak(text_reader, [r.question for r in few], [r.risky for r in few], [r.cluster for r in few])
    assert found["verdict"] == "not measured"
    assert "10 clusters" in found["reason"]


def test_counts_and_lengths_are_those_of_the_records(world, measured):
    counts = measured["counts"]
    assert sum(sum(row.values()) for row in counts["by_category"].values()) == measured["records"] == COUNT
    assert counts["by_category"]["harmless"] == {"test": 30, "train": 30}
    assert counts["licence"] == {"Apache-2.0": COUNT}
    assert counts["findings"] == {"length, warning": COUNT // 3}
    assert counts["review"] == {"not reviewed": COUNT}
    step = [len(record.steps[2].split()) for record in world]
    told = measured["lengths"]["step 3: Synthesize Visual and Textual Cues"]
    assert (told["mean"], told["p0"], told["p50"], told["p100"]) == (
        np.mean(step),
        min(step),
        np.median(step),
        max(step),
    )


def test_duplicates_across_splits_and_broken_pictures_are_found(world, tmp_path):
    records = list(world[:8])
    copy = tmp_path / "copy.jpg"
    PIL.Image.open(records[0].images[0]).convert("RGB").save(copy, quality=80)
    records[7] = dataclasses.replace(
        records[7], images=(copy,), question=records[0].question.upper() + "!", meta={"split": "elsewhere"}
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    records[4] = dataclasses.replace(records[4], images=(broken,))
    measured = measure(records)
    pair = [records[0].id, records[7].id]
    for kind in ("picture", "question"):
        assert pair in measured["duplicates"][kind]["examples"]
    assert [one["id"] for one in measured["pictures"]["unreadable"]] == [records[4].id]
    levels = [level for level, _ in findings(measured)]
    assert levels.count("error") == 3


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Say this.", "say this", "Say that.", "Now go."]), st.sampled_from("ab"), st.integers(0, 4)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_duplicates_are_those_of_a_comparison_of_all_pairs(world, drawn):
    """Question, split, and a number that makes some records twins; every third is harmless."""
    records = []
    for place, (question, split, number) in enumerate(drawn):
        risky, twin = place % 3 > 0, f"0{number}" if number < 2 else None
        meta = {"split": split}
        record = dataclasses.replace(world[0], id=f"r{place}", question=question, meta=meta, twin=twin, images=())
        records.append(record if risky else dataclasses.replace(record, risky=False, category=None, unsafe_reply=None))
    expected = collections.Counter()
    for one in records:
        near = [
            other
            for other in records
            if one.cluster != other.cluster
            and fuzz.ratio(one.question, other.question, processor=default_process) >= TEXT_SIMILARITY
        ]
        expected["records"] += bool(near)
        expected["records_across_splits"] += any(other.meta["split"] != one.meta["split"] for other in near)
        expected["records_risky_harmless"] += any(other.risky != one.risky for other in near)
    told = measure(records)["duplicates"]["question"]
    assert {name: told[name] for name in expected} == expected
    for first, second in told["examples"]:
        assert int(first[1:]) < int(second[1:]) and drawn[int(first[1:])][1] != drawn[int(second[1:])][1]


def test_tokens_are_those_that_the_model_reads(world, tiny_policy):
    records = world[:4]
    told = measure(records, processor=tiny_policy.processor)["tokens"]
    opened = [PIL.Image.open(r.images[0]).convert("RGB") for r in records]
    prompts = [len(tiny_policy.processor.encode([p], r.question).tokens) for p, r in zip(opened, records, strict=True)]
    segments = [Grammar().render(r.steps, r.safe_reply)[:-1] for r in records]
    paths = [sum(len(tiny_policy.processor.tokenize(s)) for s in told) for told in segments]
    assert (told["prompt"]["mean"], told["path"]["p100"]) == (np.mean(prompts), max(paths))
    assert told["beyond_context"] == 0 and told["refused"] == []


def test_the_tower_reads_pictures_and_not_their_company(world, tiny_policy):
    pictures = [[PIL.Image.open(record.images[0]).convert("RGB")] for record in world[0:6:2]]
    found = tower_features(tiny_policy, pictures, batch=2)
    assert found.shape[0] == 3
    np.testing.assert_allclose(tower_features(tiny_policy, pictures[::-1], batch=2)[::-1], found, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_nothing_of_a_hostile_record_acts(world, measured):
    hostile = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \u202e\u2066 {{7*7}}" + "x" * 100_000
    records = [
        dataclasses.replace(
            r,
            id=hostile + r.id,
            question=hostile,
            steps=(hostile,) * 6,
            safe_reply=hostile,
            twin=None,
            meta={"split": hostile},
        )
        for r in world[:6]
    ]
    page = render_page(measure(records), records, title=hostile)
    found, plain = Tags(page), Tags(render_page(measured, world, title="plain"))
    assert "script" not in found.tags
    assert found.tags <= plain.tags
    assert found.attributes <= plain.attributes
    assert not any(sign in page for sign in "\u202e\u2066")
    assert len(page) < 500_000


def test_the_script_writes_page_and_json(tmp_path):
    data = write_world(tmp_path / "world", 12)
    command = [sys.executable, str(ROOT / "scripts/data_report.py"), f"--data={data}", f"--out={tmp_path / 'out'}"]
    command += [f"--model={ROOT}/srpo_jax/assets/base_policy"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert "not measured" in said
    told = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert told["records"] == 12
    assert told["tokens"]["prompt"]["mean"] > 10
    assert "<h1>candidates.jsonl</h1>" in (tmp_path / "out" / "data_report.html").read_text()
