"""Starting jobs of several processes that share this machine, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "explore.max_tokens": 10,
    "explore.trees": 4,
    "explore.trunk": (320,),
    "explore.patches": (512,),
    "pack.trunk": (320,),
    "pack.patches": (512,),
    "pack.path": (256,),
    "pack.rows": (22, 28),
    "pack.row": 20,
    "pack.branch": (10,),
    "batch.trees": 4,
    "batch.accumulate": 2,
    "compute.dtype": "float32",
    "max_unknown": 1.0,
    "max_truncated": 1.0,
    "optim.warmup": 0,
    "optim.learning_rate": 0.01,
    "trainable": ("^head$", "^norm/"),
}
JUDGE = '''
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.judges import StepVerdict, Verdict


def judge(record, path):
    """Likes answers of one word."""
    count = len(path.answer.split())
    return Verdict(safe=count == 1, effective=count == 1, reason=f"{count} words")


def judge_steps(record, path):
    return [StepVerdict(step.number, True, None, "") for step in path.steps]


EVALUATOR = Evaluator("mine-1", judge, judge_steps)
'''


def make_home(home: Path, policy, records: int) -> Path:
    """A user's folder: a judge, records with pictures of two sizes and one without, a checkpoint."""
    (home / "my_judge.py").write_text(JUDGE)
    (home / "data").mkdir()
    lines = []
    for index in range(records):
        picture = Image.new("RGB", (40 + 30 * (index % 2), 60), (250, 240, 20 * index))
        ImageDraw.Draw(picture).ellipse((2, 2, 25, 25), fill=(20 * index, 0, 200))
        picture.save(home / "data" / f"{index}.png")
        steps = (
            "A high bridge.",
            "To rest." * (1 + index % 3),
            "It is high.",
            "A risk.",
            "One may fall.",
            "Say: bake.",
        )
        made = {"id": f"mine-{index}", "images": [f"{index}.png"] * (index > 0), "question": "May I rest here?"}
        made |= {"category": "Dangerous Behavior" if index % 2 else None, "steps": steps, "safe_reply": "Better bake."}
        lines.append(json.dumps(made) + "\n")
    (home / "data" / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    policy.save(home / "model")
    return home


def own(workdir: str, **changes: object) -> list[str]:
    """Flags of a run on the data of `make_home`."""
    given = {"policy.path": "model", "data.path": "data/records.jsonl", "judge": "my_judge:judge"} | SMALL
    fields = given | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        f"--config={ROOT}/configs/own_data.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


def start(home: Path, count: int, script: str, *arguments: object, devices: int = 1) -> list[subprocess.Popen]:
    """The processes of a job; one process is started without a job around it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}.",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    started = []
    for index in range(count):
        join = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments), *(join if count > 1 else [])]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=home, env=env, **options))
    return started


def finish(job: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str]]:
    """Exit code and output of every process."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, output) for process, output in zip(job, outputs, strict=True)]


def run(home: Path, count: int, script: str, *arguments: object, devices: int = 1) -> list[str]:
    """Outputs of a job that must succeed."""
    done = finish(start(home, count, script, *arguments, devices=devices))
    for index, (code, output) in enumerate(done):
        assert code == 0, f"process {index} ended with {code}:\n{output[-3000:]}"
    return [output for _, output in done]
