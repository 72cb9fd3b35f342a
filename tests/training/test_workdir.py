"""The work directory: one configuration, metrics that match the restored step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from srpo_jax.files import LockedError, read_jsonl
from srpo_jax.training.workdir import MetricsLog, WorkdirError, open_log, open_workdir


def config(**changes) -> ml_collections.ConfigDict:
    fields = {"seed": 0, "optimizer": {"rate": 1e-3, "name": "adam"}, "ladder": (32, 64), "empty": {}}
    result = ml_collections.ConfigDict(fields)
    result.update_from_flattened_dict(changes)
    return result


def test_the_same_configuration_opens_again(tmp_path):
    path = open_workdir(tmp_path / "runs" / "a", config())
    assert json.loads((path / "config.json").read_text())["optimizer"] == {"rate": 1e-3, "name": "adam"}
    (path / "checkpoints").mkdir()
    assert open_workdir(path, ml_collections.FrozenConfigDict(config())) == path


def test_another_configuration_is_refused_field_by_field(tmp_path):
    open_workdir(tmp_path, config())
    other = config(**{"optimizer.rate": 0.1, "ladder": (32, 128)})
    other.added = 1
    del other.seed
    with pytest.raises(WorkdirError) as error:
        open_workdir(tmp_path, other)
    message = str(error.value)
    assert "optimizer.rate: 0.1 now, 0.001 there" in message
    assert "ladder: [32, 128] now, [32, 64] there" in message
    assert "added: 1 now, absent there" in message
    assert "seed: absent now, 0 there" in message
    assert "optimizer.name" not in message


def test_foreign_and_broken_directories_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(WorkdirError, match=r"thesis\.tex but no config\.json"):
        open_workdir(tmp_path, config())
    with pytest.raises(WorkdirError, match="is a file"):
        open_workdir(tmp_path / "thesis.tex", config())
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(WorkdirError, match="not valid JSON"):
        open_workdir(tmp_path, config())


def test_a_kill_before_the_configuration_was_written_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.partial").write_text('{"se')
    assert open_workdir(tmp_path, config()) == tmp_path


def test_a_field_that_is_no_json_value_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"config\.optimizer\.rate is a ndarray"):
        open_workdir(tmp_path, _with_array())


def _with_array() -> ml_collections.ConfigDict:
    result = config()
    with result.ignore_type():
        result.optimizer.rate = np.ones(2)
    return result


def test_two_processes_never_share_a_work_directory(tmp_path):
    """A second one is refused by name while the first lives, and let in as soon as it is killed."""
    code = (
        "import sys, ml_collections; from srpo_jax.training.workdir import open_workdir\n"
        "for name in ('run', 'run/arm', 'run'): open_workdir(f'{sys.argv[1]}/{name}', ml_collections.ConfigDict({'a': 1}))\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    wanted = ml_collections.ConfigDict({"a": 1})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "open\n"
            for name in ("run", "run/arm"):
                with pytest.raises(LockedError, match=rf"{name} is in use by another process \(pid {first.pid} on "):
                    open_workdir(tmp_path / name, wanted)
        finally:
            first.send_signal(signal.SIGKILL)
    assert open_workdir(tmp_path / "run", wanted) == open_workdir(tmp_path / "run", wanted)


def test_jobs_that_share_a_work_directory_keep_others_out(tmp_path):
    code = (
        "import sys, ml_collections; from srpo_jax.training.workdir import open_workdir\n"
        "open_workdir(sys.argv[1], ml_collections.ConfigDict({'a': 1}), shared=True)\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    wanted = ml_collections.ConfigDict({"a": 1})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "open\n"
            with pytest.raises(LockedError, match="run is in use by another process"):
                open_workdir(tmp_path / "run", wanted)
            assert open_workdir(tmp_path / "run", wanted, shared=True) == tmp_path / "run"
        finally:
            first.send_signal(signal.SIGKILL)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')
    with MetricsLog(tmp_path, last_step=3) as log:
        assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        for step in range(4, 6):
            log.write(step, {"loss": 1 / step})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    MetricsLog(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_metrics_take_scalars_of_every_kind(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"a": np.float32(0.5), "b": np.ones((1,), np.int32), "c": float("nan"), "d": "text", "e": None})
        with pytest.raises(ValueError, match="'f' has shape"):
            log.write(2, {"f": np.ones(3)})
        with pytest.raises(ValueError, match="no name for a metric"):
            log.write(2, {"step": 3})
    [record] = read_jsonl(tmp_path / "metrics.jsonl")
    assert record == {"step": 1, "a": 0.5, "b": 1, "c": None, "d": "text", "e": None}


def test_tensorboard_events_hold_the_numbers_and_the_restart(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.0, "note": "x"})
    [first] = tmp_path.glob("events.*")
    with MetricsLog(tmp_path, last_step=0) as log:
        log.write(1, {"loss": 3.0})
    [second] = [p for p in tmp_path.glob("events.*") if p != first]
    assert _scalars(first) == [("loss", 1, 2.0)]
    assert _scalars(second) == [("loss", 1, 3.0)]
    starts = [e for e in _events(second) if e.session_log.status == event_pb2.SessionLog.START]
    assert [e.step for e in starts] == [1]


def _events(path) -> list[event_pb2.Event]:
    """Reads TFRecord framing: length, its checksum, payload, checksum."""
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        payload, data = data[12 : 12 + size], data[16 + size :]
        found.append(event_pb2.Event.FromString(payload))
    return found


def _scalars(path) -> list[tuple[str, int, float]]:
    return [(v.tag, e.step, v.simple_value) for e in _events(path) for v in e.summary.value]


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    """`Path` would make a local folder called "gs:" of it, which every host would have for itself."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match=r"gs://bucket/run is an address.*--config.checkpoints=ADDRESS"):
        open_workdir("gs://bucket/run", ml_collections.ConfigDict({"seed": 1}))
    assert not list(tmp_path.iterdir())


def test_a_tracker_is_told_what_tensorboard_is_told(tmp_path):
    told = []
    with open_log(tmp_path, tracker=lambda numbers, step: told.append((numbers, step))) as log:
        log.write(1, {"loss": 2.0, "note": "x"})
        log.write_times(1, {"update": 0.5})
    assert told == [({"loss": 2.0}, 1), ({"performance/update": 0.5}, 1)]


@pytest.mark.slow
def test_weights_and_biases_goes_on_with_the_run_of_a_work_directory(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from srpo_jax.training.tracking import weights_and_biases

    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        with (
            weights_and_biases("safety", tmp_path, {"updates": 2}) as tracker,
            open_log(tmp_path, step - 1, tracker) as log,
        ):
            log.write(step, {"loss": 1 / step})
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one run, continued"
    assert all(b"loss" in file.read_bytes() for file in files)
