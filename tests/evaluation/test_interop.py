"""Promise: other tools read what we write, and no line of what they generated is misread, dropped or defaulted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.interop.export import write_inspect_log, write_lmms_lines
from srpo_jax.evaluation.interop.responses import ImportedResponsesError, read_responses
from srpo_jax.evaluation.judging import judge_responses
from srpo_jax.evaluation.metrics import report
from srpo_jax.evaluation.samples import read_samples, samples_name, write_samples
from srpo_jax.exploration.trunks import GRAMMAR

ROOT = Path(__file__).resolve().parents[2]
RECORDS = scenes.records("test_id", 6)


def turn(record, reply):
    return "".join(GRAMMAR.render(record.steps, reply))


@pytest.fixture
def evaluated(tmp_path):
    """A row of results and its samples: one response of six is cut off, one unsafe."""
    texts = [turn(r, r.safe_reply) for r in RECORDS]
    texts[0] = turn(RECORDS[0], RECORDS[0].unsafe_reply)
    responses = [
        Response(r.id, 0, np.arange(3), i != 2, t) for i, (r, t) in enumerate(zip(RECORDS, texts, strict=True))
    ]
    judged = judge_responses(RECORDS, responses, evaluator_for("scenes"), progress=False)
    row = {"name": "tiny", "step": 3, "evaluator": "scenes-checker-1", "benchmark": "abc"}
    row |= {"decoding": {"temperature": 0.0, "max_tokens": 100, "seed": 0, "samples": 1}, **report(judged)}
    write_samples(tmp_path, samples_name(row), judged)
    return row, read_samples(tmp_path, samples_name(row)), tmp_path


def test_lmms_lines_hold_every_response_and_its_outcomes(evaluated, tmp_path):
    row, samples, _ = evaluated
    write_lmms_lines(tmp_path / "lines.jsonl", samples)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["doc"]["id"] for line in lines] == [r.id for r in RECORDS]
    assert [line["doc_id"] for line in lines] == list(range(6))
    assert [line["resps"] for line in lines] == [[[s.text]] for s in samples]
    risky = [line["S"] for line in lines if line["doc"]["risky"]]
    assert np.mean(risky) == row["S"]["rate"] == pytest.approx(1 / 3)
    assert lines[2]["filtered_resps"] == [None]
    assert lines[2]["status"] == "truncated"
    assert all("S" not in line and "over_refusal" in line for line in lines if not line["doc"]["risky"])


@pytest.mark.slow
def test_inspect_reads_the_log(evaluated, tmp_path):
    log_module = pytest.importorskip("inspect_ai.log", reason="needs inspect-ai: pip install -e '.[test-all]'")
    row, samples, folder = evaluated
    earlier = tmp_path / f"2026-01-01T00-00-00+00-00_srpo-jax_{samples_name(row)}.json"
    earlier.write_text("{}")
    path = write_inspect_log(tmp_path, row, samples, folder)
    assert [Path(found.name).name for found in log_module.list_eval_logs(str(tmp_path))] == [path.name]
    log = log_module.read_eval_log(str(path))
    assert (log.status, log.eval.model, log.eval.dataset.samples) == ("success", "tiny", 6)
    assert {s.name: s.metrics["rate"].value for s in log.results.scores}["S"] == row["S"]["rate"]
    assert len(log.samples) == 6
    for ours, theirs in zip(samples, log.samples, strict=True):
        assert (theirs.id, theirs.epoch, theirs.output.completion) == (ours.id, 1, ours.text)
        assert theirs.scores["safe"].value == ("C" if ours.safe else "I")
        assert [part.type for part in theirs.input[0].content] == ["image", "text"]
    assert log.samples[2].output.stop_reason == "max_tokens"
    log_module.write_eval_log(log, str(tmp_path / "again.eval"))
    assert log_module.read_eval_log(str(tmp_path / "again.eval")).samples[0].metadata["risky"] is True


def lines_of(**change):
    rows = [{"id": r.id, "text": turn(r, r.safe_reply)} for r in RECORDS]
    rows[1] |= change
    return rows


def written(tmp_path, rows):
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_imported_responses_are_in_the_order_of_the_questions(tmp_path):
    rows = lines_of()
    more = {**rows[0], "sample": 1, "stopped": False}
    found = read_responses(written(tmp_path, [more, *rows[::-1]]), RECORDS)
    assert [(r.record_id, r.sample) for r in found][:3] == [(RECORDS[0].id, 0), (RECORDS[0].id, 1), (RECORDS[1].id, 0)]
    assert [r.stopped for r in found][:3] == [True, False, True]
    assert found[2].text == rows[1]["text"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", *lines_of()], "line 1: not valid JSON"),
        (["", "[]"], "line 2: an object is expected, not list"),
        (lines_of(text=None), "line 2: 'text' must be of type str, not NoneType"),
        (lines_of(sample=True), "line 2: 'sample' must be of type int, not bool"),
        (lines_of(sample=-1), "number samples from 0"),
        (lines_of(stopped="yes"), "'stopped' must be of type bool"),
        (lines_of(id="other"), "line 2: no question has the id 'other'"),
        (lines_of(id=RECORDS[0].id), "line 2: sample 0 of 'test_id-0-000000' again"),
        (lines_of(text="\ud83d"), "half a surrogate pair"),
        ([{"response": "x", "id": "y"}], "line 1: the field 'text' is missing; there are id, response"),
        (lines_of()[:4], r"no response to 2 of 6 questions, such as 'test_id-0-000004'"),
    ],
)
def test_mistakes_in_imported_responses_are_named(tmp_path, rows, message):
    with pytest.raises(ImportedResponsesError, match=message):
        read_responses(written(tmp_path, rows), RECORDS)


def test_the_script_scores_and_reports(tmp_path):
    path = written(tmp_path, lines_of())
    command = [sys.executable, ROOT / "scripts" / "score.py", f"--config={ROOT}/configs/quickstart.py", "--name=other"]
    command += [
        f"--responses={path}",
        f"--workdir={tmp_path / 'run'}",
        "--config.eval.splits=('test_id',)",
        "--config.eval.n=6",
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| other " in done.stdout
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())["evaluations"]
    assert (row["SE"]["rate"], row["helpful"]["rate"]) == (1.0, 1.0)
    assert (tmp_path / "run" / "report.html").exists()
    path.write_text("{}\n")
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "line 1: the field 'id' is missing" in done.stderr
