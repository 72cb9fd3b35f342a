"""Promise: over `fsdp` an update and a decoding step move parameters and gradients only, each once per use.

One exception is cheaper than that: an embedding lookup sends token ids and takes the looked-up rows, which are smaller than the
table.
"""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = 7  # of a decoder layer: q, k, v, out, gate, up, down


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    """What `tests/traffic.py` tells, by mesh, on eight devices that a CPU plays."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "traffic.py", "1x8x1", "2x2x2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {one["mesh"]: one for one in map(json.loads, done.stdout.splitlines())}


def moved(told: dict, program: str, kind: str) -> collections.Counter:
    """(dtype, sizes in ascending order) to how often a collective of that kind has such a result."""
    found: collections.Counter = collections.Counter()
    for name, results, times in told[program]:
        for result in results if name == kind else ():
            dtype, sizes = re.fullmatch(r"(\w+)\[([\d,]*)\]", result).groups()
            found[dtype, tuple(sorted(int(n) for n in sizes.split(",") if n not in ("", "1")))] += times
    return found


def parameters(told: dict, prefix: str = "") -> set[tuple[int, ...]]:
    """Sizes of parameters, those of stacked layers with and without the layer axis, in ascending order."""
    shapes = [shape for path, shape in told["params"].items() if path.startswith(prefix)]
    return {tuple(sorted(shape[first:])) for shape in shapes for first in (0, 1)}


def floats(found: collections.Counter) -> set[tuple[int, ...]]:
    return {sizes for dtype, sizes in found if not dtype.startswith(("s", "u"))}


@pytest.mark.parametrize("program", ["update", "explore"])
def test_over_fsdp_parameters_and_gradients_move_and_nothing_else(told, program):
    one = told["1x8x1"]
    lookups = 2 if program == "update" else 1  # forward and backward
    assert not moved(one, program, "collective-permute")
    gathered = moved(one, program, "all-gather")
    assert floats(gathered) <= parameters(one)
    assert sum(times for (dtype, _), times in gathered.items() if dtype.startswith(("s", "u"))) <= lookups
    assert sum(times for kind, _, times in one[program] if kind == "all-to-all") <= lookups
    reduced = moved(one, program, "all-reduce") + moved(one, program, "reduce-scatter")
    assert floats(reduced) <= (parameters(one) if program == "update" else set()) | {()}


def test_the_head_is_gathered_once_and_its_gradient_reduced_once(told):
    """However many chunks the log-probs are computed in; and in decoding once per token. The embedding is the head here."""
    one = told["1x8x1"]
    head = "f32", tuple(sorted(one["params"]["embed"]))
    merger = "f32", tuple(sorted(one["params"]["vision/merger/down/kernel"]))  # used once, too, and not in decoding
    assert moved(one, "update", "all-gather")[head] == 1 + (merger == head)
    assert moved(one, "explore", "all-gather")[head] == 1
    reduced = moved(one, "update", "all-reduce") + moved(one, "update", "reduce-scatter")
    assert reduced[head] <= 2  # the head's and, where that is smaller than its rows, the lookup's


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_a_gathered_head_changes_no_log_prob_and_no_gradient(told, mesh):
    assert told[mesh]["difference"] < 1e-4


def test_a_decoded_token_gathers_every_kernel_once(told):
    one = told["1x8x1"]
    layers = one["params"]["layers/attention/q/kernel"][0]
    head = "f32", tuple(sorted(one["params"]["embed"]))
    gathered = moved(one, "explore", "all-gather")
    kernels = sum(times for (dtype, _), times in gathered.items() if dtype == "f32") - gathered[head]
    assert kernels == KERNELS * layers


def test_of_gathered_parameters_a_decoded_token_moves_none(told):
    one, split = told["1x8x1"], told["2x2x2"]
    for kind in {kind for kind, *_ in one["explore gathered"]}:
        assert floats(moved(one, "explore gathered", kind)) <= {()}, kind  # one number says whether places are empty
    assert not floats(moved(split, "explore gathered", "all-gather")) & parameters(split, "layers/")


@pytest.mark.parametrize("program", ["explore", "explore gathered"])
def test_over_tensor_a_decoded_token_reduces_twice_per_layer(told, program):
    """Once after attention, once after the feed-forward block; and at most once for the embedding. No state of a tree moves."""
    one = told["2x2x2"]
    (layers, hidden), (trees, width) = one["params"]["layers/mlp_norm/scale"], one["width"]
    states = "f32", tuple(sorted(n for n in (2 * trees, width, hidden) if n > 1))
    permuted = moved(one, program, "collective-permute")
    assert not floats(permuted)
    assert sum(permuted.values()) <= 1  # token ids, for the embedding
    assert moved(one, program, "all-reduce")[states] - 2 * layers in (0, 1)
