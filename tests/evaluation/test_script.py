"""scripts/evaluate.py as a user runs it."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("copies", Path(__file__).with_name("copies.py"))
copies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(copies)

JUDGE = """
import os, signal
from srpo_jax.evaluation.evaluators import Evaluator, unjudged_steps
from srpo_jax.files import JsonLines
from srpo_jax.judges.verdict import Preference, Verdict


def longer(question, pair):
    return Preference("first" if len(pair.first) >= len(pair.second) else "second", "the longer, in doubt the first")


def short(question, path):
    return Verdict(len(path.answer) < 12, None, f"{len(path.answer)} characters", refused=False)


def broken(question, path):
    return Verdict(None, None, "timeout", failed=True)


ONE, TWO = Evaluator("short-1", short, unjudged_steps, longer), Evaluator("short-2", short, unjudged_steps)
BROKEN = Evaluator("broken-1", broken, unjudged_steps)

if at := os.environ.get("KILL_AT"):
    name, number = at.split()
    inner, seen = JsonLines.append, []

    def append(self, record):
        inner(self, record)
        if self.path.stem == name:
            seen.append(record)
            if len(seen) == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    JsonLines.append = append
"""


def run(*arguments, home=ROOT, config="quickstart", **env):
    command = [
        sys.executable,
        ROOT / "scripts/evaluate.py",
        f"--config={ROOT}/configs/{config}.py",
        *map(str, arguments),
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{home}"} | env
    return subprocess.run(command, capture_output=True, text=True, cwd=home, check=False, env=env)


def test_rows_of_a_hugging_face_folder(policy, tmp_path):
    policy.save(tmp_path / "tiny")
    small = ["--config.eval.n=2", "--config.eval.max_tokens=12", "--config.eval.batch=8"]
    done = run(f"--workdir={tmp_path / 'work'}", f"--checkpoint={tmp_path / 'tiny'}", *small)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    rows = [(e["name"], e["step"], e["decoding"]["temperature"]) for e in results["evaluations"]]
    assert rows == [("tiny", 0, 0.0), ("tiny", 0, 1.0)]
    assert list(results["evaluations"][0]["by_split"]) == ["test_id", "combination", "rendering", "wording"]
    assert [e["name"] for e in results["references"]] == ["refuse everything", "comply with everything"]
    assert "| tiny (greedy)" in done.stdout
    assert "**combination**" in done.stdout
    stored = (tmp_path / "work" / "evaluation" / "responses.jsonl").read_text().splitlines()
    assert len(stored) == 16


@pytest.fixture(scope="module")
def home(tiny_policy, tmp_path_factory) -> Path:
    """A checkpoint, a copy of a benchmark and judges."""
    home = tmp_path_factory.mktemp("home")
    tiny_policy.save(home / "model")
    copies.figstep("SafeBench-Tiny.csv", 5)(home / "data" / "figstep_tiny")
    (home / "my_judge.py").write_text(JUDGE)
    return home


def evaluate(home, workdir, *arguments, judge="ONE", **env):
    small = {
        "max_tokens": 64,
        "plain": True,
        "batch": 4,
        "trunk": "(384,)",
        "patches": "(64,)",
        "temperatures": "(1.0,)",
    }
    flags = [f"--config.eval.{key}={value}" for key, value in small.items()]
    named = ["--checkpoint=model", "--benchmarks=figstep_tiny", "--limit=20", f"--judge=my_judge:{judge}"]
    return run(f"--workdir={workdir}", *named, *flags, *arguments, home=home, config="rsbench", **env)


@pytest.fixture(scope="module")
def whole(home) -> Path:
    done = evaluate(home, "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    entry = json.loads((home / "whole" / "results.json").read_text())["evaluations"][0]
    assert entry["judge_failures"]["asked"] >= 5 and 0 < entry["rates"]["ASR"]["best"] < 1, (
        "a judge of nothing tests nothing"
    )
    assert (
        "## figstep_tiny" in done.stdout and "| model (T=1) " in done.stdout and "| refuse everything " in done.stdout
    )
    return home / "whole"


def test_kill_9_loses_nothing_and_repeats_nothing(home, whole):
    for kill in ("responses 7", "verdicts 5"):
        assert evaluate(home, "killed", KILL_AT=kill).returncode == -signal.SIGKILL
    assert evaluate(home, "killed").returncode == 0
    # Responses come in the order in which they end, which depends on what decodes beside them.
    for name in ("evaluation/responses.jsonl", "evaluation/verdicts.jsonl", "results.json"):
        killed, uninterrupted = ((folder / name).read_text().splitlines() for folder in (home / "killed", whole))
        assert sorted(killed) == sorted(uninterrupted), name
    assert len((whole / "evaluation" / "responses.jsonl").read_text().splitlines()) == 20
    entry = json.loads((whole / "results.json").read_text())["evaluations"][0]
    assert entry["data"]["found"] == {"figstep_tiny": 50} and entry["data"]["limit"] == 20
    assert len(entry["data"]["files"]["SafeBench-Tiny.csv"]) == 64
    assert entry["rates"]["ASR"]["n"] == 20 and entry["judge_failures"]["failed"] == 0


@pytest.mark.slow  # five processes; the parts are tested in test_tasks.py
def test_another_judge_another_arm_and_a_broken_judge(home, whole):
    mine = shutil.copytree(whole, home / "judged")
    stored = (mine / "evaluation" / "responses.jsonl").read_bytes()
    done = evaluate(home, "judged", "--score_only", judge="TWO")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (mine / "evaluation" / "responses.jsonl").read_bytes() == stored
    rows = json.loads((mine / "results.json").read_text())["evaluations"]
    assert [row["evaluator"] for row in rows] == ["short-1", "short-2"]
    assert rows[0]["rates"] == rows[1]["rates"]

    arm = evaluate(home, "arm", f"--baseline={mine}", "--name=arm")
    assert arm.returncode == 0, arm.stderr[-3000:]
    assert "figstep_tiny, temperature 1: arm does not differ measurably from model" in arm.stdout

    for arguments, judge, said in (
        (["--config.eval.max_tokens=65", f"--baseline={mine}"], "ONE", "the baseline's decoding of figstep_tiny"),
        ([], "BROKEN", "the judge failed on"),
    ):
        done = evaluate(home, "judged", *arguments, judge=judge)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert [r["evaluator"] for r in json.loads((mine / "results.json").read_text())["evaluations"]] == [
        "short-1",
        "short-2",
    ]


@pytest.mark.slow  # five processes; the parts are tested in test_pairwise.py
def test_two_arms_side_by_side_survive_a_kill(home, whole):
    """The other arm answers every prompt, one character longer where the first answers, too."""
    for name in ("side", "other"):
        shutil.copytree(whole, home / name)
    [file] = (home / "other/evaluation/samples").glob("*.json")
    told = json.loads(file.read_text())
    answered = sum(bool(one["answer"]) for one in told["samples"])
    told["samples"] = [one | {"answer": (one["answer"] or "No") + "."} for one in told["samples"]]
    file.write_text(json.dumps(told))
    arguments = ["--score_only", "--baseline=other", "--compare"]
    assert evaluate(home, "side", *arguments, KILL_AT="preferences 9").returncode == -signal.SIGKILL
    done = evaluate(home, "side", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "side by side, in both orders, by my_judge:longer" in done.stdout and "| safer | 20 risky" in done.stdout
    told = json.loads((home / "side" / "results.json").read_text())["evaluations"][0]["pairwise"]
    lines = [json.loads(x) for x in (home / "side/evaluation/preferences.jsonl").read_text().splitlines()]
    assert told["judge_failures"] == {"asked": 4 * answered, "failed": 0} and told["baseline"]["name"] == "model"
    assert (
        len({line["key"] for line in lines}) == len(lines) <= 4 * answered
    )  # equal answers to one prompt are asked once
    lost = {"win": 0, "tie": 0, "loss": answered, "inconsistent": 0, "failed": 0, "unanswered": 20 - answered}
    assert [row["outcomes"] for row in told["rows"]] == [lost, lost]
    assert "Side by side, in both orders" in (home / "side" / "report.html").read_text()
    assert "--compare needs --baseline" in evaluate(home, "side", "--compare").stderr
