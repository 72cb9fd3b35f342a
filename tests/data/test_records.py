"""Records: a valid one is accepted, every fault is named with its field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import PIL.Image
import pytest

from srpo_jax.data.records import CATEGORIES, Record, RecordError

VALID = Record(
    id="r1",
    images=(Path("track.png"), PIL.Image.new("RGB", (4, 4))),
    question="Suggest a daring pose here.",
    risky=True,
    category="Dangerous Behavior",
    steps=tuple(f"body {i}" for i in range(6)),
    safe_reply="Pose on the platform instead.",
)


def test_the_nine_categories():
    assert len(set(CATEGORIES)) == 9


def test_harmless_and_text_only_records_are_valid():
    harmless = dataclasses.replace(VALID, id="r2", risky=False, category=None, twin="r1", images=())
    assert harmless.twin == "r1" and harmless.meta == {}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"id": " "}, "id", "is empty"),
        ({"id": 7}, "id", "must be a string, not int"),
        ({"images": [Path("a.png")]}, "images", "must be a tuple"),
        ({"images": ("a.png",)}, "images", "must hold paths or pictures, not str"),
        ({"question": ""}, "question", "is empty"),
        ({"risky": 1}, "risky", "must be true or false, not int"),
        ({"category": None}, "category", "none of the nine categories"),
        ({"category": "Danger"}, "category", "'Danger' is none of the nine categories"),
        ({"risky": False}, "category", "must be null on a harmless record"),
        ({"steps": ("a",) * 5}, "steps", "has 6 steps, not 5"),
        ({"steps": ("a",) * 5 + ("\n",)}, "steps", "step 6 is empty"),
        ({"steps": ("a",) * 5 + (3,)}, "steps", "step 6 must be a string, not int"),
        ({"steps": ("a </think>",) + ("a",) * 5}, "steps", "step 1 contains the tag </think>"),
        ({"steps": ("Step 1: x\na",) + ("a",) * 5}, "steps", "step 1 contains the step heading"),
        ({"safe_reply": ""}, "safe_reply", "is empty"),
        ({"unsafe_reply": "<think>"}, "unsafe_reply", "contains the tag <think>"),
        ({"twin": "r1"}, "twin", "names the record itself"),
        ({"meta": None}, "meta", "must be a mapping"),
    ],
)
def test_faults_name_record_and_field(change, field, message):
    with pytest.raises(RecordError, match=message) as error:
        dataclasses.replace(VALID, **change)
    assert [name for name, _ in error.value.problems] == [field]
    assert repr(change.get("id", "r1")) in str(error.value)


def test_all_faults_are_reported_together():
    with pytest.raises(RecordError) as error:
        dataclasses.replace(VALID, question="", steps=("a",), safe_reply="")
    assert [name for name, _ in error.value.problems] == ["question", "steps", "safe_reply"]
