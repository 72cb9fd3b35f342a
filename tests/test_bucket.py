"""Promises of gs:// addresses: weights are read from one and written to one, checkpoints live at one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import srpo_jax as sx
from srpo_jax.checkpoint import Checkpointer, CheckpointError
from srpo_jax.files import read_jsonl
from srpo_jax.models import saving

sys.path.insert(0, str(Path(__file__).parent))
from bucket import serve
from jobs import make_home, own, run

pytestmark = pytest.mark.slow
pytest.importorskip("gcsfs", reason="needs the extra gcs")


@pytest.fixture(scope="module")
def objects():
    """What the bucket holds: names to (generation, bytes)."""
    with serve() as (environment, objects), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield objects


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_policy_goes_to_a_bucket_and_comes_back(objects, tiny_policy, monkeypatch):
    """In several files, each sent as soon as it is written; config.json comes last, so half a model is none."""
    order, inner = [], saving.Draft.done
    monkeypatch.setattr(saving.Draft, "done", lambda self, name: order.append(name) or inner(self, name))
    saving.save_params(
        "gs://bucket/model", tiny_policy.config, tiny_policy.params, tiny_policy.processor, max_shard_bytes=40_000
    )
    assert order[0].startswith("model-00001-of-") and order[-1] == "config.json"
    assert {f"model/{name}" for name in order} == {name for name in objects if name.startswith("model/")}
    again = sx.load_policy("gs://bucket/model")
    assert again.config == tiny_policy.config
    assert_equal(again.params, tiny_policy.params)
    with pytest.raises(FileExistsError, match="gs://bucket/model exists"):
        tiny_policy.save("gs://bucket/model")
    with pytest.raises(FileNotFoundError, match="gs://bucket/typo"):
        sx.load_policy("gs://bucket/typo")


def test_an_export_that_fails_leaves_nothing(objects, tiny_policy, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tiny_policy.processor), "save", full)
    with pytest.raises(OSError, match=r"gs://bucket/failed: could not be written .*nothing was left behind"):
        tiny_policy.save("gs://bucket/failed")
    assert not [name for name in objects if name.startswith("failed")]


def test_checkpoints_in_a_bucket_are_kept_pruned_and_set_aside_like_local_ones(objects):
    state = {"x": jax.numpy.arange(1000.0), "y": {"z": np.ones((3, 4))}}
    with Checkpointer("gs://bucket/steps", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, jax.tree.map(lambda x, step=step: x * step, state), {"step": step})
    assert {name.split("/")[1] for name in objects if name.startswith("steps/")} == {"2", "3"}
    for damage in ("steps/3/state/_METADATA", "steps/2/commit_success.txt"):
        del objects[damage]
    with Checkpointer("gs://bucket/steps", keep=2) as checkpoints:  # a step without its commit never was
        with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
            checkpoints.restore(None, state)
        checkpoints.save(4, state, {"step": 4})
        found, metadata = checkpoints.restore(None, state)
    assert metadata == {"step": 4}
    assert_equal(found, state)


def test_a_job_of_two_processes_reads_weights_from_a_bucket_keeps_checkpoints_there_and_exports_to_it(
    objects, tiny_policy, tmp_path
):
    home = make_home(tmp_path, tiny_policy, 8)
    saving.save_params("gs://bucket/start", tiny_policy.config, tiny_policy.params, tiny_policy.processor)
    flags = {"policy__path": "gs://bucket/start", "checkpoints": "gs://bucket/run", "optim__steps": 4}
    run(home, 2, "train.py", *own("remote", **flags, updates=2, checkpoint_every=1))
    assert not (home / "remote" / "checkpoints").exists()
    assert {name.split("/")[1] for name in objects if name.startswith("run/")} == {"1", "2"}
    told = json.loads((home / "remote" / "config.json").read_text())
    (home / "remote" / "config.json").write_text(json.dumps(told | {"updates": 3}))
    run(home, 1, "train.py", *own("remote", **flags, updates=3, checkpoint_every=1))
    assert [line["step"] for line in read_jsonl(home / "remote" / "metrics.jsonl")] == [1, 2, 3]
    run(home, 2, "export.py", "--checkpoint=remote", "--output=gs://bucket/exported", "--dtype=float32")
    exported = sx.load_policy("gs://bucket/exported")
    before = sx.load_policy(home / "model", dtype="bfloat16").params  # as own_data.py reads it
    np.testing.assert_array_equal(exported.params["embed"], before["embed"])
    assert not np.allclose(exported.params["head"], before["head"], atol=1e-3)
    assert exported.config == tiny_policy.config
