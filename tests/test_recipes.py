"""The configurations of the released sizes: what they resolve to, and a run of each kind made small.

What they resolve to is kept in tests/golden, so that a change of a default or of the sharding table shows where it reaches a
run of released size. If the change is meant:

    UPDATE_GOLDEN=1 python -m pytest tests/test_recipes.py -k golden
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from srpo_jax import config as configs
from srpo_jax import sharding
from srpo_jax.files import read_jsonl
from srpo_jax.models.released import config_of
from srpo_jax.preflight.programs import abstract_params
from srpo_jax.recipes import released
from srpo_jax.training.state import select_trainable

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SIZES, KINDS = ("3b", "7b", "32b", "72b"), ("lora", "full")
MESH = jax.sharding.AbstractMesh((1, 8, 2), sharding.AXES)  # both ways of splitting


def load(size: str, variant: str):
    """`get_config` of the file that a user names."""
    spec = importlib.util.spec_from_file_location(size, ROOT / "configs" / f"qwen2_5_vl_{size}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def told(size: str, kind: str) -> str:
    """The resolved configuration, and every parameter with its shape, dtype and split over fsdp=8, tensor=2."""
    config = load(size, kind)
    params = abstract_params(config, config_of(config.policy.path), MESH)
    trainable = configs.run_config(config).trainable
    moving = jax.eval_shape(lambda p: select_trainable(p, trainable)[0], params)
    lines = [json.dumps(json.loads(config.to_json_best_effort()), indent=1, sort_keys=True)]
    for path, x in sorted(sharding.flatten(params).items()):
        split = ", ".join(str(axis) for axis in x.sharding.spec)
        lines.append(f"{path}: {list(x.shape)} {x.dtype} ({split}) {'trained' if path in moving else 'frozen'}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_golden_configuration_and_shardings(size, kind):
    file = GOLDEN / f"qwen2_5_vl_{size}_{kind}.txt"
    now = told(size, kind)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(now, encoding="utf-8")
    kept = file.read_text(encoding="utf-8")
    difference = difflib.unified_diff(kept.splitlines(), now.splitlines(), file.name, "now", lineterm="", n=1)
    assert now == kept, (
        "\n".join(difference) + "\nmeant? UPDATE_GOLDEN=1 python -m pytest tests/test_recipes.py -k golden"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_sizes_share_one_small_run(kind):
    """So that one run stands for all of them."""
    small = {load(size, f"{kind},runlocal").to_json_best_effort() for size in SIZES}
    assert len(small) == 1
    assert (
        configs.run_config(load("3b", f"{kind},runlocal")).trainable == configs.run_config(load("3b", kind)).trainable
    )


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="runlocal"):
        released("3B", "lora,local")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_small_run_trains_and_is_evaluated(kind, tmp_path):
    def script(name: str, *flags: str) -> None:
        command = [sys.executable, ROOT / "scripts" / name, f"--config={ROOT}/configs/qwen2_5_vl_7b.py:{kind},runlocal"]
        done = subprocess.run([*map(str, command), *flags], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]

    script("train.py", f"--workdir={tmp_path / 'run'}")
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["explore/branches"] == 8 * 24
    script("evaluate.py", f"--workdir={tmp_path / 'evaluated'}", f"--checkpoint={tmp_path / 'run'}")
    assert json.loads((tmp_path / "evaluated" / "results.json").read_text())["evaluations"]
