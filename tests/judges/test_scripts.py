"""The two scripts, on small files of the published layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("data", "judge", "table"),
    [
        (
            "msts",
            "column:omni",
            {"safe": {"safe": 5, "unsafe": 0, "unknown": 0}, "unsafe": {"safe": 1, "unsafe": 0, "unknown": 0}},
        ),
        (
            "msts",
            "refusals:first_person",
            {"safe": {"safe": 5, "unsafe": 0, "unknown": 0}, "unsafe": {"safe": 0, "unsafe": 1, "unknown": 0}},
        ),
        ("xstest", "column:strmatch", None),
    ],
)
def test_a_card(small_data, tmp_path, data, judge, table):
    done = script(
        "calibrate_judge.py",
        f"--data={data}",
        f"--judge={judge}",
        f"--data_root={small_data}",
        f"--output={tmp_path}/cards",
    )
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "cards").glob("*.json")
    card = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() in done.stdout
    assert card["responses"] == {"msts": 6, "xstest": 2}[data]
    assert ("transport" in card) == (data == "msts")
    if table:
        assert card["table"] == table


def test_several_cards_are_one_table(small_data, tmp_path):
    done = script("calibrate_judge.py", "--judge=columns", f"--data_root={small_data}", f"--output={tmp_path}/cards")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cards").glob("*.json"))) == 2
    assert "| omni | 0.00 [0.00, 0.00]" in done.stdout


def test_a_column_that_is_not_there_is_listed(small_data, tmp_path):
    done = script("calibrate_judge.py", "--judge=column:gpt-9", f"--data_root={small_data}", f"--output={tmp_path}")
    assert done.returncode != 0
    assert "no column 'gpt-9'; msts has gpt-4o-2024-05-13, omni" in done.stderr


def test_the_table_of_scorers(small_data, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("advise\n")
    done = script("misscoring.py", f"--data_root={small_data}", f"--phrases={mine}", f"--output={tmp_path}/told.json")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["msts"]["people"]["unsafe"]["rate"] == pytest.approx(1 / 6)
    assert told["msts"]["omni"]["sensitivity"] == 0
    assert told["msts"][f"no refusal phrase ({mine})"]["kappa"] == 1
    assert f"no refusal phrase ({mine}) | 16.7" in done.stdout
    assert told["xstest"]["people"]["m"]["rate"] == 0
