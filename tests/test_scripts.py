"""The scripts as a user runs them: own records and pictures, an own judge, a checkpoint folder, and their mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

import srpo_jax as sx
from srpo_jax.files import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
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
SIZES = ((40, 90), (200, 60), (33, 33), None)  # width, height; the last record has no picture
SMALL = {
    "explore.max_tokens": 10,
    "explore.trees": 3,
    "explore.trunk": (320,),
    "explore.patches": (512,),
    "pack.trunk": (320,),
    "pack.patches": (512,),
    "pack.path": (256,),
    "pack.rows": (6, 28),
    "pack.row": 20,
    "pack.branch": (10,),
    "batch.trees": 2,
    "batch.accumulate": 1,
    "max_unknown": 1.0,
    "max_truncated": 1.0,
    "updates": 2,
    "optim.warmup": 0,
    "optim.learning_rate": 0.01,
    "trainable": ("^head$", "^norm/"),
}


def record(index: int, **changes) -> dict:
    steps = ("A high bridge.", "To rest.", "It is high.", "A risk.", "One may fall.", "Say: bake.")
    made = {
        "id": f"mine-{index}",
        "images": [f"{index}.png"],
        "question": "May I rest here?",
        "category": "Dangerous Behavior" if index % 2 == 0 else None,
        "steps": list(steps),
        "safe_reply": "Better bake.",
    }
    return made | changes


def write_records(folder: Path, records: list[dict]) -> Path:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def home(tiny_policy, tmp_path_factory) -> Path:
    """What a user has: pictures, records, a judge and a checkpoint."""
    home = tmp_path_factory.mktemp("home")
    (home / "my_judge.py").write_text(JUDGE)
    (home / "data").mkdir()
    records = []
    for index, size in enumerate(SIZES):
        if size is not None:
            picture = Image.new("RGB", size, (250, 240, 20 * index))
            ImageDraw.Draw(picture).ellipse((2, 2, 25, 25), fill=(20 * index, 0, 200))
            picture.save(home / "data" / f"{index}.png")
        records.append(record(index, **({} if size else {"images": []})))
    write_records(home / "data", records)
    tiny_policy.save(home / "model")
    return home


def start(home: Path, script: str, *arguments: object) -> subprocess.Popen:
    """Starts a script in the user's folder, as the header of configs/own_data.py tells."""
    env = os.environ | {"PYTHONPATH": f".{os.pathsep}{ROOT}"}
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def own(model: str = "model", data: str = "data/records.jsonl", workdir: str = "run") -> list[str]:
    files = [f"--config.policy.path={model}", f"--config.data.path={data}", "--config.judge=my_judge:judge"]
    small = [f"--config.{field}={value}" for field, value in SMALL.items()]
    return [f"--config={ROOT}/configs/own_data.py", f"--workdir={workdir}", *files, *small]


@pytest.fixture(scope="module")
def trained(home) -> Path:
    code, _, err = finish(start(home, "train.py", *own()))
    assert code == 0, err[-3000:]
    return home / "run"


@pytest.fixture(scope="module")
def readers(home, trained) -> dict[str, tuple[int, str, str]]:
    """What the scripts say that read a finished run."""
    few = {"n": 2, "max_tokens": 12, "batch": 8, "trunk": (320,), "patches": (512,)}
    few |= {"path": "data/records.jsonl", "evaluator": "my_judge:EVALUATOR"}
    mine = [f"--config.eval.{field}={value}" for field, value in few.items()]
    running = {
        "explore": start(home, "explore.py", *own(workdir="trees"), "--checkpoint=run"),
        "export": start(home, "export.py", "--checkpoint=run", "--output=exported", "--dtype=float32"),
        "evaluate": start(home, "evaluate.py", *own(workdir="evaluated"), "--checkpoint=run", *mine),
    }
    return {name: finish(process) for name, process in running.items()}


def test_training_on_own_data_leaves_a_whole_work_directory(trained, home):
    lines = list(read_jsonl(trained / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert sum(line["pairs"] for line in lines) > 0
    assert json.loads((trained / "config.json").read_text())["data"]["path"] == "data/records.jsonl"
    assert list(trained.glob("events.*")) and (trained / "checkpoints" / "2").is_dir()
    trees = list(read_jsonl(trained / "trees" / "round_000" / "branches.jsonl"))
    assert [tree["record_id"] for tree in trees] == [f"mine-{i}" for i in range(4)]
    lengths = [tree["ends"][0] for tree in trees]
    assert lengths[0] > lengths[3]  # the text-only prompt holds no picture
    verdicts = list(read_jsonl(trained / "trees" / "round_000" / "verdicts.jsonl"))
    assert verdicts and all(v["reason"].endswith("words") for v in verdicts)


def test_explore_reads_the_run_and_prints_shares_by_prefix(readers, home):
    code, out, err = readers["explore"]
    assert code == 0, err[-3000:]
    assert '"explore/branches": 96.0' in out
    assert [line.split()[0] for line in out.splitlines()[-6:]] == list("012345")
    mine = list(read_jsonl(home / "trees" / "trees" / "branches.jsonl"))
    first = list(read_jsonl(home / "run" / "trees" / "round_000" / "branches.jsonl"))
    assert [t["tokens"] for t in mine] == [t["tokens"] for t in first]  # the trunks
    assert mine != first  # of the trained parameters


def test_explore_goes_on_with_the_step_it_began_with(readers, home):
    """Not with what is the newest checkpoint by now: here it began with one that is gone."""
    told = json.loads((home / "trees" / "config.json").read_text())
    assert told["checkpoint_step"] == 2
    (home / "older").mkdir()
    (home / "older" / "config.json").write_text(json.dumps(told | {"checkpoint_step": 1}))
    code, _, err = finish(start(home, "explore.py", *own(workdir="older"), "--checkpoint=run"))
    assert code != 0 and "holds no step 1; it holds [2]" in err[-1500:]
    assert [path.name for path in (home / "older").iterdir()] == ["config.json"]


def test_evaluate_writes_results_of_own_records_and_an_own_evaluator(readers, home):
    code, out, err = readers["evaluate"]
    assert code == 0, err[-3000:]
    results = json.loads((home / "evaluated" / "results.json").read_text())
    assert [(e["name"], e["step"]) for e in results["evaluations"]] == [("run", 2), ("run", 2)]
    assert {e["evaluator"] for e in results["evaluations"]} == {"mine-1"}
    assert "| run (greedy)" in out
    assert "2 prompts, evaluator mine-1, step 2; see evaluated/report.html" in out
    assert "Finished saving" not in err  # what libraries log


def test_transformers_loads_the_export_and_gives_the_same_logits(readers, home, trained):
    code, _, err = readers["export"]
    assert code == 0, err[-3000:]
    exported = sx.load_policy(home / "exported")
    picture = Image.open(home / "data" / "1.png")
    inputs = exported.encode([{"image": picture, "question": "May I rest here?"}])
    ours = sx.forward(exported, exported.params, inputs)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        home / "exported", dtype=torch.float32
    ).eval()
    length = int(inputs.lengths[0])
    tokens = torch.tensor(np.asarray(inputs.tokens)[:, :length]).long()
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(home / "exported")
    pixels = images(images=[picture], return_tensors="pt")
    with torch.no_grad():
        theirs = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        ).logits
    assert float(theirs.std()) > 0.5
    np.testing.assert_allclose(ours[:, :length], theirs.numpy(), atol=1e-4)
    # It is the trained policy, not the one it started from.
    before = sx.load_policy(home / "model", dtype="bfloat16")  # as own_data.py reads it
    assert not np.allclose(before.params["head"], exported.params["head"])
    jax.tree.map(np.testing.assert_array_equal, before.params["vision"], exported.params["vision"])


@pytest.fixture(scope="module")
def mistakes(home, trained) -> dict[str, tuple[int, str, str]]:
    """What train.py says of bad input, two at a time."""
    alien = home / "alien"
    shutil.copytree(home / "model", alien)
    told = json.loads((alien / "config.json").read_text())
    (alien / "config.json").write_text(json.dumps(told | {"model_type": "llava"}))
    for name in ("broken", "long"):
        shutil.copytree(home / "data", home / name)
    cut = home / "broken" / "1.png"
    cut.write_bytes(cut.read_bytes()[:60])
    write_records(home / "long", [record(0, question="May I rest here? " * 120)])
    calls = {
        "field": [*own(workdir="a"), "--config.explore.temprature=0.5"],
        "workdir": [*own(), "--config.loss.srpo.lambda_=0.9"],
        "architecture": own(model="alien", workdir="b"),
        "image": own(data="broken/records.jsonl", workdir="c"),
        "context": own(data="long/records.jsonl", workdir="d"),
        "path": [flag.replace("pack.path=(256,)", "pack.path=(32,)") for flag in own(workdir="e")],
    }
    said, names = {}, list(calls)
    for pair in (names[:2], names[2:4], names[4:]):
        running = {name: start(home, "train.py", *calls[name]) for name in pair}
        said |= {name: finish(process) for name, process in running.items()}
    return said | {"world": finish(start(home, "evaluate.py", *own(workdir="f"), "--checkpoint=run"))}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("field", ["temprature", "temperature"]),
        ("workdir", ["run belongs to a run with another configuration", "loss.srpo.lambda_: 0.9 now, 0.3 there"]),
        ("architecture", ["alien", "llava", "qwen2_5_vl"]),
        ("image", ["line 2", "mine-1", "1.png", "damaged"]),
        ("context", ["mine-0", "context", "512", "shorten the question"]),
        ("path", ["record 'mine-0'", "path and reply (pack.path)", "exceeds the largest bucket 32"]),
        ("world", ["config.eval.evaluator is empty", "package.module:NAME"]),
    ],
)
def test_mistakes_are_named(mistakes, home, name, parts):
    """In one message; and nothing is explored before they are."""
    code, _, err = mistakes[name]
    assert code == 1
    assert name == "field" or "Traceback" not in err, err[-3000:]
    assert name != "path" or not (home / "e" / "trees").exists()
    for part in parts:
        assert part in err[-1500:], err[-3000:]
