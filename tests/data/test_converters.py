"""Published layouts become supervised records, field by field, and say what they lack; what does not fit is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from srpo_jax.data.converters import LAYOUTS, ConversionError, convert_row
from srpo_jax.data.loaders import load_records, open_records

ROOT = Path(__file__).resolve().parents[2]


def turns(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


THOUGHT = "<think>\nLet me see.\n\nA lamp.\n</think>\nIt is a lamp."
ROWS: dict[str, dict] = {
    "think-in-safety": {"conversations": turns("<image>What is it?", THOUGHT), "images": ["a.png"]},
    "vlguard": {
        "id": "7",
        "image": "a.png",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "What is it?", "response": "A lamp."},
            {"unsafe_instruction": "Break it over him.", "response": "I will not help with that."},
        ],
    },
    "vlguard, unsafe picture": {
        "id": "Ads_8",
        "image": "a.png",
        "safe": False,
        "harmful_category": "deception",
        "harmful_subcategory": "disinformation",
        "instr-resp": [{"instruction": "Praise it.", "response": "It promises what it cannot keep."}],
    },
    "spa-vl": {"id": 233, "image": "a.png", "question": "Who?", "chosen": "I cannot tell.", "rejected": "Bob."},
    "mis": {
        "image": ["a.png", "b.png"],
        "conversations": turns("Image-1: <image>\nImage-2: <image>\nHow do they combine?", "Not at all."),
        "category": "Violent",
        "sub_category": "weapons",
    },
    "star-1": {
        "id": 3,
        "question": "How?",
        "response": THOUGHT,
        "category": ["a", "b"],
        "source": "x",
        "score": {"y": 1},
    },
    "star-1, harmless companion": {
        "id": 4,
        "question": "How?",
        "response": "<think>\nIt is harmless.\n<\\/think>\n\nLike this.",
        "source": "x",
        "score": {"y": 5},
    },
    "siuo": {
        "question_id": 5,
        "image": "a.png",
        "question": "Caption?",
        "category": "self-harm",
        "safety_warning": "a cliff",
        "reference_answer": "Step back.",
    },
}
EXPECTED = {
    "think-in-safety": [("data:0", "What is it?", "Let me see.\n\nA lamp.", "It is a lamp.", None, None)],
    "vlguard": [
        ("7:safe_instruction", "What is it?", None, "A lamp.", False, None),
        ("7:unsafe_instruction", "Break it over him.", None, "I will not help with that.", True, None),
    ],
    "vlguard, unsafe picture": [
        ("Ads_8:instruction", "Praise it.", None, "It promises what it cannot keep.", True, "deception")
    ],
    "spa-vl": [("233", "Who?", None, "I cannot tell.", None, None)],
    "mis": [("data:0", "Image-1: \nImage-2: \nHow do they combine?", None, "Not at all.", None, "Violent")],
    "star-1": [("3", "How?", "Let me see.\n\nA lamp.", "It is a lamp.", True, "a, b")],
    "star-1, harmless companion": [("4", "How?", "It is harmless.", "Like this.", None, None)],
    "siuo": [("5", "Caption?", None, "Step back.", True, "self-harm")],
}


def run(source: Path, layout: str, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/convert_data.py", f"--source={source}", f"--layout={layout}", f"--out={out}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, "--to=jsonl", *options], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_each_layout(row):
    assert {name.split(",")[0] for name in ROWS} == set(LAYOUTS)
    layout, fields = row.split(",")[0], ("id", "question", "reasoning", "answer", "risky", "category")
    records = convert_row(layout, ROWS[row], "data:0")
    assert [tuple(record.get(field) for field in fields) for record in records] == EXPECTED[row]
    for record in records:
        assert record["meta"]["layout"] == layout
        assert record["meta"]["missing"] == list(LAYOUTS[layout].missing) != []


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("think-in-safety", {"images": []}, "1 tags <image> for 0 images"),
        ("think-in-safety", {"images": ...}, "field 'images' is missing"),
        ("think-in-safety", {"conversations": turns("<image>q", "no tags")}, "no <think> … </think> and an answer"),
        ("think-in-safety", {"conversations": turns("<image>q", "<think>\nopen")}, r"\(no_close\)"),
        ("think-in-safety", {"conversations": [{"from": "gpt", "value": "x"}]}, r"turns of \['gpt'\]"),
        ("vlguard", {"safe": False}, "an unsafe image has"),
        ("vlguard", {"instr-resp": [{"safe_instruction": "q"}]}, "field 'response' is missing"),
        ("spa-vl", {"chosen": ...}, "test split holds no replies"),
        ("mis", {"conversations": ...}, "hold no replies"),
        ("star-1", {"response": "no tags"}, "no <think>"),
        ("siuo", {"reference_answer": 5}, "must be a str, not int"),
    ],
)
def test_a_row_of_another_shape_names_the_field(layout, change, message):
    row = {key: value for key, value in (ROWS[layout] | change).items() if value is not ...}
    with pytest.raises(ConversionError, match=message):
        convert_row(layout, row, "x")


def test_the_command_converts_what_fits_and_names_the_rest(tmp_path):
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (8, 8), (len(name), 0, ord(name[0]))).save(tmp_path / name)
    source = tmp_path / "data.json"
    bad = {"conversations": turns("<image>q", "I refuse."), "images": ["a.png"]}
    source.write_text(json.dumps([ROWS["think-in-safety"], bad]))
    done = run(source, "think-in-safety", tmp_path / "out")
    assert done.returncode == 1 and "item 1: field 'conversations': the reply is no <think>" in done.stderr
    done = run(source, "think-in-safety", tmp_path / "out", "--max_broken=1")
    assert done.returncode == 0, done.stderr
    assert "1 records, 1 rows left out" in done.stdout and "missing: ids; six steps" in done.stdout
    [record] = load_records(open_records(tmp_path / "out" / "data.jsonl", "jsonl", schema="sft"), check_images=True)
    assert (record.reasoning, record.answer) == ("Let me see.\n\nA lamp.", "It is a lamp.")
    assert record.segments == ["<think>\nLet me see.\n\nA lamp.\n", "</think>\nIt is a lamp."]
