"""Promise: one command gives base, SFT and SRPO in one table, the same command does nothing twice, and the command that
made the base policy writes a folder that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import srpo_jax as sx
from srpo_jax.data import scenes

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "data.n": 8,
    "updates": 2,
    "optim.warmup": 0,
    "batch.trees": 2,
    "explore.trees": 4,
    "explore.k": 2,
    "pack.rows": (14,),
    "pack.branches": (12,),
    "eval.n": 2,
    "eval.batch": 8,
}


def run(script: str, config: str, fields: dict[str, object], *arguments: object) -> str:
    """What a script prints; fails with its last words if it fails."""
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [
        sys.executable,
        ROOT / "scripts" / script,
        f"--config={ROOT}/configs/{config}",
        *map(str, arguments),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_ends_with_one_table_and_resumes_without_work(tmp_path):
    folder = tmp_path / "run"
    first = run("quickstart.py", "quickstart.py", SMALL, f"--workdir={folder}")
    written = (folder / "results.json").read_bytes()
    rows = json.loads(written)["evaluations"]
    wanted = [(name, t) for name in ("base", "SFT", "SRPO") for t in (0.0, 1.0)]
    assert [(row["name"], row["decoding"]["temperature"]) for row in rows] == wanted
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 2, 2]
    assert all(row["prompts"]["risky"] == row["prompts"]["harmless"] > 0 for row in rows)
    table = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")]
    assert table[2:8] == [f"{name} ({'T=1' if t else 'greedy'})" for name, t in wanted]
    assert 'id="comb-0-7"' in (folder / "report.html").read_text()  # what SRPO explored, all 8 trees
    # The same command again: not a response, verdict, branch or update more.
    lines = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    assert lines
    second = run("quickstart.py", "quickstart.py", SMALL, f"--workdir={folder}")
    assert second.splitlines()[:8] == first.splitlines()[:8]
    assert (folder / "results.json").read_bytes() == written
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == lines


@pytest.mark.slow
def test_the_base_policy_is_made_by_one_command(tmp_path):
    fields = {"data.n": 8, "updates": 2, "optim.warmup": 0, "batch.trees": 2}
    run("make_base_policy.py", "base.py", fields, f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'policy'}")
    made, embedded = sx.load_policy(tmp_path / "policy"), sx.load_policy(ROOT / "srpo_jax/assets/base_policy")
    assert made.config == embedded.config
    record = scenes.records("test_id", 2)[0]
    inputs = made.encode([{"image": record.images[0], "question": record.question}])
    logits = sx.forward(made, made.params, inputs)
    assert np.isfinite(np.asarray(logits, np.float32)).all()
