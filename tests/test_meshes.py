"""Promise: exploration, evaluation and update give the same on every mesh, and the same bits on the same mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2")
NEAR = 1e-4  # a lead of the drawn token over the second best that rounding may turn


def run(folder: Path, *meshes: str) -> dict[str, dict]:
    """What `tests/meshes.py` tells, by mesh, on eight devices that a CPU plays."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "meshes.py", folder, *meshes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["mesh"]: one for one in told}


@pytest.fixture(scope="module")
def folder(tiny_policy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("meshes") / "policy"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def told(folder) -> dict[str, dict]:
    return run(folder, *MESHES)


def agree(ours: list[int], theirs: list[int], ties: float) -> int:
    """How many tokens two branches share; all of them, unless a draw was a near tie."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    assert same == len(ours) == len(theirs) or ties < NEAR
    return same


@pytest.mark.slow
@pytest.mark.parametrize("how", ["explore", "gathered"])
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_exploration_is_the_same_on_every_mesh(told, mesh, how):
    """Tokens, save after a near tie, and log-probs of the raw policy within 1e-4; whether parameters are gathered or not."""
    one, other = told["1x1x1"]["explore"], told[mesh][how]
    tokens = 0
    for tree in range(len(one["tokens"])):
        for branch, length in enumerate(one["lengths"][tree]):
            ours, theirs = (x["tokens"][tree][branch][: x["lengths"][tree][branch]] for x in (one, other))
            same = agree(ours, theirs, one["ties"][tree][branch])
            ours, theirs = (np.asarray(x["logprobs"][tree][branch][:same]) for x in (one, other))
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
            tokens += length
    assert tokens > 500


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_evaluation_is_the_same_on_every_mesh(told, mesh):
    one, other = told["1x1x1"]["evaluate"], told[mesh]["evaluate"]
    for ours, theirs, ties in zip(one["tokens"], other["tokens"], one["ties"], strict=True):
        agree(ours, theirs, ties)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_updates_are_the_same_on_every_mesh(told, mesh):
    one, other = told["1x1x1"]["update"], told[mesh]["update"]
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert one["metrics"][0]["has_safety_label"] == one["metrics"][0]["has_key_sentence"] == 1
    for name, numbers in one["parameters"].items():
        np.testing.assert_allclose(other["parameters"][name], numbers, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_same_mesh_gives_the_same_bits(told, folder):
    assert run(folder, "2x2x2")["2x2x2"] == told["2x2x2"]
