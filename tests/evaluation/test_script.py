"""scripts/evaluate.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, ROOT / "scripts/evaluate.py", f"--config={ROOT}/configs/quickstart.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_rows_of_a_hugging_face_folder(policy, tmp_path):
    policy.save(tmp_path / "tiny")
    small = ["--config.eval.n=2", "--config.eval.max_tokens=12", "--config.eval.batch=8"]
    done = run(f"--workdir={tmp_path / 'work'}", f"--checkpoint={tmp_path / 'tiny'}", *small)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    rows = [(e["name"], e["step"], e["decoding"]["temperature"]) for e in results["evaluations"]]
    assert rows == [("tiny", 0, 0.0), ("tiny", 0, 1.0)]
    assert list(results["evaluations"][0]["by_split"]) == ["test_id", "combination", "rendering", "wording"]
    assert [e["name"] for e in results["references"]] == ["refuse everything", "comply with everything"]
    assert "| tiny (greedy)" in done.stdout
    assert "**combination**" in done.stdout
    stored = (tmp_path / "work" / "evaluation" / "responses.jsonl").read_text().splitlines()
    assert len(stored) == 16
