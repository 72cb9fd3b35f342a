"""Loading records: every supported source gives the same records, every fault is named with place, record and field."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from srpo_jax.data.images import open_image
from srpo_jax.data.loaders import LoadError, load_hf, load_jsonl
from srpo_jax.data.records import CATEGORIES
from srpo_jax.paths import STEP_TITLES, Grammar

BODIES = [f"body {i}" for i in range(1, 7)]


def raw(**changes) -> dict:
    """A canonical record; a change to `...` removes the field."""
    record = {
        "id": "r1",
        "images": ["pictures/track.png"],
        "question": "Suggest a daring pose here.",
        "risky": True,
        "category": "Dangerous Behavior",
        "steps": BODIES,
        "safe_reply": "Pose on the platform.",
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def picture(shade: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 6), (shade, shade, shade))


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    picture(shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture(10).save(tmp_path / "pictures" / "track.png")
    return tmp_path


def write(folder, *records, name="data.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_canonical_records(folder):
    harmless = raw(id="r2", risky=False, category=None, images=[], twin="r1", meta={"split": "x"}, unsafe_reply=None)
    first, second = load_jsonl(write(folder, raw(twin="r2"), "", harmless), check_images=True)
    assert (first.id, first.risky, first.category, first.twin) == ("r1", True, "Dangerous Behavior", "r2")
    assert first.images == ((folder / "pictures" / "track.png").resolve(),)
    assert first.steps == tuple(BODIES)
    assert (second.risky, second.category, second.images, second.meta) == (False, None, (), {"split": "x"})


@pytest.mark.parametrize("style", [str.title, lambda name: name.lower().replace(" ", "_")])
def test_published_names_and_one_text_of_reasoning(folder, style):
    reasoning = "".join(Grammar().heading_line(i) + body + "\n" for i, body in enumerate(BODIES, 1))
    published = {
        "image": "pictures/track.png",
        style("question"): " Where to? ",
        style("unsafe category"): "Privacy Violations",
        style("safe reply"): "There.",
        style("unsafe reply"): "Here.",
        style("explainable reasoning"): reasoning,
    }
    [record] = load_jsonl(write(folder, published))
    assert record.id == "data:1"
    assert (record.question, record.safe_reply, record.unsafe_reply) == ("Where to?", "There.", "Here.")
    assert record.risky
    assert record.steps == tuple(BODIES)


def titled(titles=STEP_TITLES) -> list[dict]:
    return [{"title": title, "text": body} for title, body in zip(titles, BODIES, strict=True)]


def test_titled_steps(folder):
    [record] = load_jsonl(write(folder, raw(steps=titled())))
    assert record.steps == tuple(BODIES)


SWAPPED = (STEP_TITLES[1], STEP_TITLES[0], *STEP_TITLES[2:])
HEADINGS = "".join(Grammar().heading_line(i) + body + "\n" for i, body in enumerate(BODIES, 1))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"steps": titled(SWAPPED)}, "steps", "step 1 is titled 'Analyze Textual Request'; expected 1 Analyze Visual"),
        ({"steps": HEADINGS.replace("Step 2: ", "Step 4: ")}, "steps", "step 2 is numbered 4"),
        (
            {"steps": HEADINGS.replace("Evaluate Potential", "Ignore")},
            "steps",
            "step 5 is titled 'Ignore Consequences'",
        ),
        ({"steps": HEADINGS + "</think>"}, "steps", "contains <think> or </think>"),
        ({"steps": "no headings at all"}, "steps", "before the first step heading; expected 1 Analyze"),
        ({"steps": BODIES[:5]}, "steps", "has 6 steps, not 5"),
        ({"steps": [*BODIES[:5], " "]}, "steps", "step 6 is empty"),
        ({"steps": [*BODIES[:5], {"text": "x"}]}, "steps", "step 6 must hold the strings"),
        ({"steps": 7}, "steps", "must be a list of six steps"),
        ({"steps": ...}, "steps", "is missing"),
        ({"images": ...}, "images", r"is missing; write \[\]"),
        ({"images": ["none.png"]}, "images", "'none.png' is not a file in the image folder"),
        ({"images": ["pictures"]}, "images", "'pictures' is not a file"),
        ({"images": ["../secret.png"]}, "images", "leaves the image folder"),
        ({"images": ["/etc/hostname"]}, "images", "leaves the image folder"),
        ({"images": ["link.png"]}, "images", "leaves the image folder"),
        ({"images": [3]}, "images", "3 is no file name"),
        ({"category": "Dangerous behaviour"}, "category", "did you mean 'Dangerous Behavior'"),
        ({"category": "Astrology"}, "category", "none of the nine categories"),
        ({"category": None}, "category", "none of the nine categories"),
        ({"category": ..., "risky": ...}, "risky", "is missing"),
        ({"risky": "no"}, "risky", "must be true or false"),
        ({"questoin": "x"}, "questoin", "unknown field; did you mean 'question'"),
        ({"Question": "again"}, "Question", "gives 'question' a second time"),
        ({"safe_reply": " "}, "safe_reply", "is empty"),
        ({"id": 5}, "id", "must be a string"),
        ({"twin": "r9"}, "twin", "there is no record 'r9'"),
        ({"twin": "r0"}, "twin", "'r0' is as risky as this record"),
    ],
)
def test_a_fault_names_line_record_field_and_remedy(folder, change, field, message):
    os.symlink("/etc/hostname", folder / "link.png")
    path = write(folder, raw(id="r0"), raw(**change))
    with pytest.raises(LoadError, match=message) as error:
        load_jsonl(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(error.value.problems) == (2 if change == {"steps": titled(SWAPPED)} else 1)
    for problem in error.value.problems:
        assert problem.startswith(f"line 2, record {change.get('id', 'r1')!r}, field {field!r}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "r2", ', "line 2: not valid JSON"),
        ('["r2"]', "line 2, record 'data:2', field '(all)': a record is an object"),
        ('{"id": "a", "id": "b"}', "line 2: not valid JSON: a field is given twice"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('"\\ud800', "line 2: not valid JSON"),
    ],
)
def test_broken_lines_are_numbered(folder, line, message):
    with pytest.raises(LoadError) as error:
        load_jsonl(write(folder, raw(), line))
    assert error.value.problems[0].startswith(message)


def test_bytes_that_are_no_text_are_numbered(folder):
    path = write(folder, raw())
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(LoadError, match="line 2: not valid JSON"):
        load_jsonl(path)


def test_duplicate_ids_name_both_places(folder):
    with pytest.raises(LoadError, match="line 3, record 'r1', field 'id': line 1 has the same id"):
        load_jsonl(write(folder, raw(), raw(id="r2"), raw()))


def test_all_faults_are_reported_together_up_to_a_number(folder):
    records = [raw(id=f"r{i}", question="", safe_reply="") for i in range(15)]
    with pytest.raises(LoadError) as error:
        load_jsonl(write(folder, *records))
    assert len(error.value.problems) == 30
    assert str(error.value).count("is empty") == 20
    assert str(error.value).endswith("and 10 more")


def test_empty_and_missing_files(folder):
    with pytest.raises(LoadError, match="holds no record"):
        load_jsonl(write(folder, ""))
    with pytest.raises(FileNotFoundError):
        load_jsonl(folder / "none.jsonl")


def test_images_are_decoded_up_front_on_request(folder):
    picture = folder / "pictures" / "track.png"
    picture.write_bytes(picture.read_bytes()[:50])
    path = write(folder, raw())
    load_jsonl(path)
    with pytest.raises(LoadError, match=r"line 1, record 'r1', field 'images': .*track.png: cut short or damaged"):
        load_jsonl(path, check_images=True)


def test_images_may_lie_elsewhere(folder, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("text"), raw(images=["track.png"]))
    [record] = load_jsonl(path, folder / "pictures")
    assert open_image(record.images[0]).size == (8, 6)


@pytest.fixture
def published() -> datasets.Dataset:
    """A data set as published ones are: embedded images, published names, a class label."""
    columns = {
        "image": [picture(10), picture(20), picture(10)],
        "Question": ["q0", "q1", "q2"],
        "Unsafe Category": [0, 8, 0],
        "Safe Reply": ["a", "b", "c"],
        "Explainable Reasoning": [HEADINGS] * 3,
    }
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in columns},
            "image": datasets.Image(),
            "Unsafe Category": datasets.ClassLabel(names=list(CATEGORIES)),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def check(records, cache):
    assert [r.question for r in records] == ["q0", "q1", "q2"]
    assert [r.category for r in records] == ["Dangerous Behavior", "Privacy Violations", "Dangerous Behavior"]
    shades = [np.asarray(open_image(r.images[0]))[0, 0, 0] for r in records]
    assert shades == [10, 20, 10]
    assert all(r.images[0].is_relative_to(cache) for r in records)
    assert len(list(cache.iterdir())) == 2  # the same picture is stored once


@pytest.mark.parametrize("form", ["memory", "saved", "splits", "parquet", "parquet folder"])
def test_hugging_face_sources(published, tmp_path, form):
    source = tmp_path / "set"
    if form == "memory":
        source = published
    elif form == "saved":
        published.save_to_disk(str(source))
    elif form == "splits":
        datasets.DatasetDict({"train": published, "test": published}).save_to_disk(str(source))
        with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
            load_hf(source, "dev")
    else:
        source.mkdir()
        published.to_parquet(str(source / "train.parquet"))
        source = source / "train.parquet" if form == "parquet" else source
    records = load_hf(source, image_folder=tmp_path / "images", check_images=True)
    check(records, tmp_path / "images")


def test_a_source_that_only_the_hub_library_understands(published, tmp_path):
    """A folder of JSON lines goes the way of a hub id, through `datasets.load_dataset`."""
    (tmp_path / "set").mkdir()
    row = {"image": "a.png", "Question": "q", "Unsafe Category": "Violence", "Safe Reply": "a", "steps": HEADINGS}
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps(row) + "\n")
    picture(9).save(tmp_path / "a.png")
    [record] = load_hf(os.path.relpath(tmp_path / "set"), image_folder=tmp_path)
    assert record.images == ((tmp_path / "a.png").resolve(),)


def test_faults_in_data_sets_name_the_row(tmp_path):
    rows = [
        raw(images=[{"bytes": png(1), "path": None}]),
        raw(id="r2", images=[{"bytes": None, "path": "/etc/hostname"}]),
    ]
    dataset = datasets.Dataset.from_list(rows)
    with pytest.raises(LoadError, match="row 1, record 'r2', field 'images': '/etc/hostname' leaves the image folder"):
        load_hf(dataset, image_folder=tmp_path)
    with pytest.raises(LoadError, match=r"row 0, record 'r1', field 'images': .*not a picture"):
        load_hf(datasets.Dataset.from_list([raw(images=[b"text"])]), image_folder=tmp_path, check_images=True)


def test_the_documented_example_loads(folder):
    documentation = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    example = json.loads(documentation.read_text(encoding="utf-8").split("```json")[1].split("```")[0])
    picture(5).save(folder / "pictures" / "rails.png")
    twin = {**example, "id": example["twin"], "risky": False, "category": None, "twin": example["id"]}
    first, _ = load_jsonl(write(folder, example, twin))
    assert {
        field: getattr(first, field) for field in ("id", "question", "category", "safe_reply", "unsafe_reply", "meta")
    } == {field: example[field] for field in ("id", "question", "category", "safe_reply", "unsafe_reply", "meta")}
    assert list(first.steps) == example["steps"]
