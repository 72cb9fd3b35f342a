"""Promises of a job of several processes: it does what one process does, shares the work, and ends together."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from srpo_jax.distributed import HEARTBEAT, RESTART
from srpo_jax.files import read_family, read_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from jobs import finish, make_home, own, run, start

RECORDS = 8
DIGITS = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


@pytest.fixture(scope="module")
def home(tiny_policy, tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"), tiny_policy, RECORDS)


def train(home: Path, count: int, workdir: str, updates: int = 2, **changes: object) -> Path:
    flags = own(workdir, updates=updates, optim__steps=4, checkpoint_every=1, **changes)
    outputs = run(home, count, "train.py", *flags)
    assert [("done:" in output) for output in outputs] == [True] + [False] * (count - 1)
    return home / workdir


@pytest.fixture(scope="module")
def alone(home) -> Path:
    return train(home, 1, "one")


@pytest.fixture(scope="module")
def pair(home) -> Path:
    return train(home, 2, "two")


@pytest.fixture(scope="module")
def whole(home) -> Path:
    return train(home, 1, "whole", updates=4)


def trees(workdir: Path) -> dict[str, dict]:
    return {line["record_id"]: line for line in read_family(workdir / "trees" / "round_000" / "branches.jsonl")}


def assert_same_trees(ours: Path, theirs: Path) -> None:
    """The same tokens; log-probs in float32 within 1e-4, because programs of other shapes sum in another order."""
    mine, other = trees(ours), trees(theirs)
    assert mine.keys() == other.keys() and mine
    for name, tree in mine.items():
        for a, b in zip(tree["branches"], other[name]["branches"], strict=True):
            assert (a["prefix"], a["tokens"], a["status"]) == (b["prefix"], b["tokens"], b["status"])
            np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-4)


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    mine, other = (list(read_jsonl(workdir / "metrics.jsonl")) for workdir in (ours, theirs))
    assert [line.keys() for line in mine] == [line.keys() for line in other] and mine
    for a, b in zip(mine, other, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], **DIGITS, err_msg=name)


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, pair):
    """Explore, update, checkpoint: the same trees, token by token, and the same losses."""
    folder = pair / "trees" / "round_000"
    shares = [list(read_jsonl(folder / name)) for name in ("branches.jsonl", "branches-1.jsonl")]
    assert [len(share) for share in shares] == [RECORDS // 2, RECORDS // 2]
    assert_same_trees(pair, alone)
    assert_same_metrics(pair, alone)
    assert sorted(p.name for p in (pair / "checkpoints").iterdir()) == ["1", "2"]
    times = list(read_jsonl(pair / "performance.jsonl"))
    assert [line["step"] for line in times] == [1, 2]
    for line in times:
        parts = sum(line.get(part, 0.0) for part in ("explore", "judge", "data", "update", "save"))
        assert 0 < line["data"] + line["update"] <= parts <= line["seconds"]
        assert line["flops_per_second"] > line["tokens_per_second"] > 0
    assert times[0]["explore"] > 0 and times[0]["compilations"] > 0 and "explore" not in times[1]
    assert 0.1 < times[0]["occupancy"] <= 1 and "occupancy" not in times[1]


@pytest.mark.slow
def test_four_processes_and_processes_with_two_devices_do_what_one_does(home, alone):
    four = train(home, 4, "four")
    assert_same_trees(four, alone)
    assert_same_metrics(four, alone)
    flags = own("two-by-two", updates=2, optim__steps=4, checkpoint_every=1, mesh__fsdp=2, mesh__tensor=2)
    run(home, 2, "train.py", *flags, devices=2)
    assert_same_metrics(home / "two-by-two", alone)


@pytest.mark.slow
def test_a_restart_with_another_number_of_processes_goes_on(home, alone, pair, whole):
    """In the middle of exploration and in the middle of updates."""
    for count in (4, 1):
        workdir = home / f"from-two-to-{count}"
        shutil.copytree(pair, workdir)
        told = json.loads((workdir / "config.json").read_text())
        (workdir / "config.json").write_text(json.dumps(told | {"updates": 4}))
        shutil.rmtree(workdir / "checkpoints" / "2")
        train(home, count, workdir.name, updates=4)
        assert_same_metrics(workdir, whole)
        lost = home / f"lost-{count}"
        shutil.copytree(pair, lost)
        shutil.rmtree(lost / "checkpoints")
        (lost / "metrics.jsonl").unlink()
        file = lost / "trees" / "round_000" / "branches-1.jsonl"
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:1]))
        train(home, count, lost.name)
        assert_same_trees(lost, alone)
        assert_same_metrics(lost, alone)


@pytest.mark.slow
def test_a_reference_model_is_read_where_its_parameters_are(home):
    """Log-probs under the policy before training, computed by two processes together, are those of one."""
    weights = {"loss__weights__dpo": 1.0, "loss__weights__srpo": 0.0}
    one, two = (train(home, count, f"dpo-{count}", updates=1, **weights) for count in (1, 2))
    assert_same_metrics(one, two)
    lines = [list(read_jsonl(workdir / "trees" / "round_000" / "reference.jsonl")) for workdir in (one, two)]
    assert [line["tree"] for line in lines[0]] == [line["tree"] for line in lines[1]] and len(lines[0]) == RECORDS
    for a, b in zip(*lines, strict=True):
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.slow
def test_all_processes_killed_during_a_save_go_on_from_the_step_before(home, whole):
    job = start(home, 2, "train.py", *own("all-killed", updates=4, optim__steps=4, checkpoint_every=1))
    checkpoints = home / "all-killed" / "checkpoints"

    def saving() -> bool:
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
        return "1" in names and any("orbax-checkpoint-tmp" in name for name in names)

    wait_for(saving, job, pause=0.002)
    for process in job:
        process.send_signal(signal.SIGKILL)
    finish(job)
    assert "4" not in [path.name for path in checkpoints.iterdir()]
    train(home, 2, "all-killed", updates=4)
    assert_same_metrics(home / "all-killed", whole)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "4"]


@pytest.mark.slow
def test_explore_evaluate_and_export_run_in_several_processes(home, pair):
    few = {"max_tokens": 12, "batch": 2, "trunk": (320,), "patches": (512,), "temperatures": (1.0,)}
    few |= {"path": "data/records.jsonl", "evaluator": "my_judge:EVALUATOR", "gather": True}
    mine = [f"--config.eval.{field}={value}" for field, value in few.items()]
    for count in (1, 2):
        run(home, count, "evaluate.py", *own(f"eval-{count}"), *mine, "--checkpoint=two")
        run(home, count, "explore.py", *own(f"trees-{count}", explore__gather=True), "--checkpoint=two")
        run(home, count, "export.py", "--checkpoint=two", f"--output=hf-{count}", "--dtype=float32")
    one, two = (json.loads((home / f"eval-{count}" / "results.json").read_text()) for count in (1, 2))
    devices = [told["evaluations"][0]["provenance"].pop("device") for told in (one, two)]
    assert devices == ["1 × cpu", "2 × cpu"]
    assert one == two and one["evaluations"][0]["step"] == 2
    assert len(list(read_jsonl(home / "eval-2" / "evaluation" / "responses-1.jsonl"))) == RECORDS // 2
    one, two = (read_family(home / f"trees-{count}" / "trees" / "branches.jsonl") for count in (1, 2))
    assert sorted(one, key=str) == sorted(two, key=str)
    one, two = (load_file(home / f"hf-{count}" / "model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def wait_for(condition, job, seconds: float = 300, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in job)
        time.sleep(pause)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_others_say_so_and_end(home, victim):
    job = start(home, 2, "train.py", *own(f"dies-{victim}", updates=5000, checkpoint_every=100))
    metrics = home / f"dies-{victim}" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, job)
    job[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(job, timeout=60)[1 - victim]
    assert time.monotonic() - killed < 30
    if victim == 1:
        assert code == RESTART and "process 1 of the job is lost" in output, output[-3000:]
    else:  # JAX aborts at once where its coordination service is gone
        assert code != 0 and "distributed service" in output, output[-3000:]


@pytest.mark.slow
def test_when_one_process_is_asked_to_end_all_save_the_same_step(home):
    """And the scheduler reads in their exit codes that the job is to be started again."""
    flags = own("preempted", updates=5000, checkpoint_every=5000)
    job = start(home, 2, "train.py", *flags)
    metrics = home / "preempted" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 1, job)
    job[1].send_signal(signal.SIGTERM)
    done = finish(job, timeout=60)
    assert [code for code, _ in done] == [RESTART, RESTART], done[0][1][-3000:]
    last = list(read_jsonl(metrics))[-1]["step"]
    assert [path.name for path in (home / "preempted" / "checkpoints").iterdir()] == [str(last)]
    assert f"step {last} is saved" in done[0][1]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_message(home):
    """A configuration of another run, which the lead process alone notices."""
    (home / "other").mkdir()
    (home / "other" / "config.json").write_text(json.dumps({"seed": 1}))
    done = finish(start(home, 2, "train.py", *own("other")), timeout=90)
    assert [code for code, _ in done] == [1, 1]
    assert "belongs to a run with another configuration" in done[0][1]
    assert "process 0 of the job stopped" in done[1][1] and "another configuration" in done[1][1]


def test_a_process_that_cannot_find_its_job_says_what_to_give(home):
    [(code, output)] = finish(start(home, 1, "train.py", *own("lonely"), "--distributed"))
    assert code == 1 and "--coordinator=HOST:PORT --num_processes=N --process_id=I" in output
    assert not (home / "lonely").exists()


def test_silence_is_noticed_before_the_runtime_aborts():
    from srpo_jax import distributed

    assert distributed.LOST + 3 * distributed.BEAT < HEARTBEAT < 30
