"""Promise: the example of one's own training loop runs as it stands, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_loop_of_ones_own_runs_and_the_loss_falls():
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "docs" / "own_loop.py"), "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+)", done.stdout)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert len((ROOT / "docs" / "own_loop.py").read_text().split("policy = ")[1].splitlines()) <= 40
