"""Promise: killed with SIGKILL at any moment, the same command ends with the bits of the uninterrupted run."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from srpo_jax.distributed import RESTART
from srpo_jax.runs import load_run

SCRIPT = Path(__file__).with_name("killable.py")


def run(workdir: Path, *kill: object) -> int:
    command = [sys.executable, str(SCRIPT), str(workdir), *map(str, kill)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, -signal.SIGKILL, RESTART), done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("resume") / "whole"
    assert run(workdir) == 0
    return workdir


def assert_same_run(workdir: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", *(f"trees/round_00{r}/{f}.jsonl" for r in (0, 1) for f in ("branches", "verdicts"))):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    (ours, step), (theirs, steps) = load_run(workdir), load_run(whole)
    assert step == steps == 8
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kill_in_every_phase_changes_nothing(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    kills = [("branches", 3), ("verdicts", 20), ("update", 3), ("save", 1, 3), ("branches", 1), ("update", 1)]
    for kill in kills:
        assert run(workdir, *kill) == -signal.SIGKILL
    assert run(workdir) == 0
    assert_same_run(workdir, uninterrupted)


def test_a_run_that_is_asked_to_end_saves_what_it_holds_and_is_to_be_started_again(uninterrupted, tmp_path):
    """At once while it explores, where all is on the disk; after the update under way else."""
    workdir = tmp_path / "run"
    assert run(workdir, "branches", 3, 0, "SIGTERM") == RESTART
    assert not (workdir / "metrics.jsonl").read_bytes()
    assert run(workdir, "update", 3, 0, "SIGINT") == RESTART
    assert saved(workdir) == [2, 3]  # a checkpoint every second update; the third was under way
    assert run(workdir, "branches", 1, 0, "SIGTERM") == RESTART  # round 0 is done after one more update
    assert saved(workdir) == [3, 4]
    assert run(workdir) == 0
    assert_same_run(workdir, uninterrupted)


def saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_nothing(uninterrupted, tmp_path, seed):
    rng = random.Random(seed)
    workdir = tmp_path / "run"
    for _ in range(8):
        event = rng.choice(["branches", "verdicts", "update", "save"])
        run(workdir, event, rng.randint(1, {"verdicts": 60}.get(event, 4)), rng.choice([0, 1, 5, 20, 100]))
    assert run(workdir) == 0
    assert_same_run(workdir, uninterrupted)


def test_the_uninterrupted_run_has_something_to_lose(uninterrupted):
    """Two rounds whose trees differ, and updates that move the parameters."""
    rounds = [(uninterrupted / f"trees/round_00{r}/branches.jsonl").read_text() for r in (0, 1)]
    assert rounds[0] != rounds[1]
    assert len((uninterrupted / "metrics.jsonl").read_text().splitlines()) == 8
