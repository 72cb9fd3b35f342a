"""Checkpoints: exact, atomic under kill -9 and a full disk, tolerant of damage, strict about mismatches."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax.checkpoint import Checkpointer, CheckpointError, CheckpointMismatchError


def make_state(value: int):
    weights = jax.random.normal(jax.random.key(value), (64, 32))  # does not compress to nothing
    params = {"layer": {"w": weights, "b": jnp.full((3,), value, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    key = jax.random.key_data(jax.random.key(value))
    return {"params": params, "optimizer": optimizer.init(params), "key": key, "step": np.asarray(value, np.int32)}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 1 to 3 were saved, the newest two are kept."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {"data": {"next_index": step}, "name": "λ"})
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_round_trip_is_exact_and_old_steps_go(saved):
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.steps() == [2, 3]
        for step in (None, 2):
            number = step or 3
            state, metadata = checkpointer.restore(step, make_state(0))
            assert_equal(state, make_state(number))
            assert metadata == {"data": {"next_index": number}, "name": "λ"}
        with pytest.raises(CheckpointError, match=r"holds no step 1; it holds \[2, 3\]"):
            checkpointer.restore(1, make_state(0))


def test_a_new_directory_is_empty(tmp_path):
    with Checkpointer(tmp_path / "a" / "b") as checkpointer:
        assert checkpointer.latest() is None
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpointer.restore(None, make_state(0))


def test_overwriting_after_save_does_not_reach_the_checkpoint(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x, y = jnp.arange(3_000_000.0), np.arange(3_000_000.0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": x, "y": y}, {})
        for _ in range(20):
            x = overwrite(x)
            y[:] = -1
        restored, _ = checkpointer.restore(1, {"x": x, "y": y})
    np.testing.assert_array_equal(np.asarray(restored["x"]), np.arange(3_000_000.0))
    np.testing.assert_array_equal(restored["y"], np.arange(3_000_000.0))


def test_mismatches_are_all_named(copy):
    state = make_state(0)
    state["params"]["layer"]["w"] = jnp.zeros((64, 33))
    state["params"]["layer"]["b"] = jnp.zeros((3,), jnp.float32)
    state["params"]["extra"] = jnp.zeros(1)
    del state["key"]
    with Checkpointer(copy) as checkpointer:
        with pytest.raises(CheckpointMismatchError) as error:
            checkpointer.restore(None, state)
        assert checkpointer.steps() == [2, 3]  # a mismatch is no damage
    message = str(error.value)
    assert "/params/layer/w: float32[64, 33] wanted, float32[64, 32] saved" in message
    assert "/params/layer/b: float32[3] wanted, bfloat16[3] saved" in message
    assert "/params/extra: not in the checkpoint" in message
    assert "/key: only in the checkpoint" in message
    assert "/optimizer" not in message


def cut_short(step: Path):
    for file in (step / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
        lambda step: (step / "state" / "_METADATA").unlink(),
        lambda step: shutil.rmtree(step / "state" / "ocdbt.process_0"),
    ],
)
def test_a_damaged_step_is_set_aside(copy, damage, caplog):
    damage(copy / "3")
    with Checkpointer(copy) as checkpointer:
        with pytest.raises(CheckpointError, match="3 cannot be read"):
            checkpointer.restore(3, make_state(0))
        state, metadata = checkpointer.restore(None, make_state(0))
        assert metadata["data"] == {"next_index": 2}
        assert_equal(state, make_state(2))
        assert checkpointer.latest() == 2
        checkpointer.save(3, make_state(3), {})
        assert_equal(checkpointer.restore(None, make_state(0))[0], make_state(3))
    assert (copy / "damaged-3").is_dir()


def test_bad_arguments(saved, tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(TypeError, match="state/a/b is a float"):
            checkpointer.save(4, {"a": {"b": 1.0}}, {})
        with pytest.raises(TypeError):
            checkpointer.save(4, {"a": jnp.ones(1)}, {"x": object()})
        with pytest.raises(CheckpointError, match="step 3 is not after step 3"):
            checkpointer.save(3, make_state(3), {})


def run_python(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)


def test_kill_during_a_save_leaves_the_step_before(tmp_path):
    code = """
        import sys, jax.numpy as jnp
        from srpo_jax.checkpoint import Checkpointer
        checkpointer = Checkpointer(sys.argv[1], keep=2)
        step = (checkpointer.latest() or 0) + 1
        while True:
            checkpointer.save(step, {"x": jnp.full((2_000_000,), step, jnp.int32)}, {"step": step})
            step += 1
    """
    like = {"x": jnp.zeros((2_000_000,), jnp.int32)}
    reached = 0
    for _ in range(2):  # the second run starts on what the first left behind
        writer = run_python(code, tmp_path)
        try:
            deadline = time.monotonic() + 120
            while not (killed := _saving_after(tmp_path, reached)) and time.monotonic() < deadline:
                assert writer.poll() is None
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert killed, "no save was seen under way"
        left_behind = list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            latest = checkpointer.latest()
            assert latest is not None
            assert latest > reached
            for step in checkpointer.steps():
                state, metadata = checkpointer.restore(step, like)
                assert metadata == {"step": step}
                np.testing.assert_array_equal(np.asarray(state["x"]), np.full(2_000_000, step))
            reached = latest
        assert not any(path.exists() for path in left_behind)


def _saving_after(folder: Path, reached: int) -> bool:
    """Whether a save is under way and a step later than `reached` is complete."""
    names = os.listdir(folder)
    done = [int(name) for name in names if name.isdigit()]
    return any("orbax-checkpoint-tmp" in name for name in names) and max(done, default=0) > reached


def test_full_disk_while_saving(tmp_path):
    code = """
        import resource, signal, sys, numpy as np
        from srpo_jax.checkpoint import Checkpointer, CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        x = np.random.default_rng(0).integers(0, 2**31, 500_000)  # does not compress
        checkpointer = Checkpointer(sys.argv[1], keep=1)
        checkpointer.save(1, {"x": x}, {})
        checkpointer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            checkpointer.save(2, {"x": x + 1}, {})
            checkpointer.wait()
        except CheckpointError as error:
            print(error)
        assert checkpointer.steps() == [1], checkpointer.steps()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.save(3, {"x": x + 2}, {})
        checkpointer.close()
        with Checkpointer(sys.argv[1]) as again:
            assert again.steps() == [3]
            assert (np.asarray(again.restore(None, {"x": x})[0]["x"]) == x + 2).all()
        print("saved again")
    """
    process = run_python(code, tmp_path, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "saving step 2" in output
    assert "step 1 is intact; the disk is full: free space" in output
    assert output.endswith("saved again\n")


def test_restore_into_another_sharding(tmp_path):
    code = """
        import sys, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from srpo_jax.checkpoint import Checkpointer
        mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
        rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp")))
        x = jax.device_put(jnp.arange(24.0).reshape(4, 6), rows)
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"x": x}, {})
            for sharding in (columns, rows):
                like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
                y = checkpointer.restore(1, like)[0]["x"]
                assert y.sharding == sharding, y.sharding
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        print("resharded")
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    process = run_python(code, tmp_path, env=environment, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert output == "resharded\n", errors[-2000:]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_reader_changes_nothing(copy):
    """Neither the half save of a live run, nor what lies beyond `keep`, nor a damaged step."""
    cut_short(copy / "3")
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "4.orbax-checkpoint-tmp" / "part").write_bytes(b"of a save under way")
    before = contents(copy)
    with Checkpointer(copy, keep=1, read_only=True) as reader:
        assert_equal(reader.restore(None, make_state(0))[0], make_state(2))
        with pytest.raises(CheckpointError, match="reading only"):
            reader.save(5, make_state(5), {})
    assert contents(copy) == before
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpointer(copy / "typo", read_only=True)
    assert not (copy / "typo").exists()


def test_a_save_under_way_completes_whoever_reads(tmp_path):
    code = """
        import sys, jax.numpy as jnp, numpy as np
        from srpo_jax.checkpoint import Checkpointer
        with Checkpointer(sys.argv[1], keep=2) as checkpointer:
            for step in range(1, 40):
                checkpointer.save(step, {"x": jnp.full((2_000_000,), step, jnp.int32)}, {"step": step})
        print("saved")
    """
    like = {"x": jnp.zeros((2_000_000,), jnp.int32)}
    writer = run_python(code, tmp_path / "run", stderr=subprocess.PIPE)
    seen = set()
    try:
        while writer.poll() is None:
            if not (tmp_path / "run").is_dir() or not _saving_after(tmp_path / "run", 0):
                continue
            with Checkpointer(tmp_path / "run", read_only=True) as reader:
                state, metadata = reader.restore(None, like)
            np.testing.assert_array_equal(np.asarray(state["x"]), np.full(2_000_000, metadata["step"]))
            seen.add(metadata["step"])
    finally:
        writer.kill()
    output, errors = writer.communicate()
    assert output == "saved\n", errors[-2000:]
    assert len(seen) >= 2, seen
    with Checkpointer(tmp_path / "run", read_only=True) as reader:
        assert reader.steps() == [38, 39]


def test_a_part_can_be_left_unread(saved):
    like = make_state(0)
    like["optimizer"] = jax.tree.map(lambda _: ..., like["optimizer"])
    with Checkpointer(saved, read_only=True) as reader:
        state, _ = reader.restore(2, like)
    assert all(leaf is ... for leaf in jax.tree.leaves(state["optimizer"]))
    assert_equal(state["params"], make_state(2)["params"])
