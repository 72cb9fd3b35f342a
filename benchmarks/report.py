"""How fast a report opens: 5,000 responses to prompts with a picture each, and trees, in headless Chromium from a file.

python benchmarks/report.py [--responses=5000] [--trees=48]    prints one JSON line; needs playwright and a Chromium on the PATH
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from srpo_jax.data import scenes
from srpo_jax.data.records import Record
from srpo_jax.evaluation.combs import Comb, CombBranch, CombSet, judged_steps, make_comb, write_combs
from srpo_jax.evaluation.evaluate import score
from srpo_jax.evaluation.evaluators import evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import benchmark_digest
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.results import add_result
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.paths import parse

COUNT = flags.DEFINE_integer("responses", 5000, "Of the report, an even number.", lower_bound=2)
TREES = flags.DEFINE_integer("trees", 48, "Of the report, with 24 branches each.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Times that the page is opened.", lower_bound=1)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
)


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        path = make(Path(folder), COUNT.value)
        made = time.perf_counter() - begin
        pictures = len(list(Path(folder).glob("evaluation/samples/*.webp")))
        told: dict[str, float] = {"responses": COUNT.value, "pictures": pictures, "trees": TREES.value}
        told |= {"megabytes": round(path.stat().st_size / 1e6, 1), "written_s": round(made, 1), **opened(path)}
        print(json.dumps(told))


def make(workdir: Path, count: int) -> Path:
    """A report of `count` responses that all have their own question and picture."""
    records = scenes.records("train", count)
    evaluator, nothing = evaluator_for("scenes"), np.zeros(0, np.int32)
    texts = [
        "".join(GRAMMAR.render(r.steps, (i % 3 and r.unsafe_reply) or r.safe_reply)) for i, r in enumerate(records)
    ]
    responses = [Response(r.id, 0, nothing, True, text) for r, text in zip(records, texts, strict=True)]
    row = {"name": "policy", "step": 0, "evaluator": evaluator.name, "decoding": {"temperature": 0.0}}
    row["benchmark"] = benchmark_digest(records)
    row |= score(responses, records, evaluator, row, workdir / "evaluation", progress=False)
    add_result(workdir / "results.json", row)
    combs = tuple(comb(workdir / "evaluation", record) for record in records[: TREES.value])
    what = {"title": "round 0", "good": "favourable", "meaning": "safe and effective", "judge": evaluator.name}
    found = CombSet(**what, step_judge=evaluator.name, total=len(combs), combs=combs)
    write_combs(workdir / "evaluation", "policy", found)
    return write_report(workdir)


def comb(folder: Path, record: Record) -> Comb:
    """Four branches from each of six prefixes, every other one with the unsafe reply."""
    judge, branches = evaluator_for("scenes"), []
    for number in range(24):
        reply = (number % 2 and record.unsafe_reply) or record.safe_reply
        path = parse("".join(GRAMMAR.render(record.steps, reply)), stopped=True, grammar=GRAMMAR)
        verdict, prefix = judge.answer(record, path), number // 4
        told = (reply, "ok", verdict.safe and verdict.effective, verdict.safe, verdict.effective, verdict.refused)
        steps = judged_steps(record, path, judge.steps)[prefix:]
        branches.append(CombBranch(prefix, 0, "", steps, reply, *told, verdict.reason))
    return make_comb(folder, record, branches, judge.steps)


def opened(path: Path) -> dict[str, float]:
    """Seconds from asking for the page until the browser of samples shows the first one, and until the last is shown."""
    from playwright.sync_api import sync_playwright

    program = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    ready, last = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS.split())
        for _ in range(REPEATS.value):
            page = browser.new_page()
            begin = time.perf_counter()
            page.goto(f"file://{path}")
            page.wait_for_function(
                "document.documentElement.dataset.ready && document.querySelector('#detail .answer')"
            )
            ready.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            page.evaluate("select(state.shown.length - 1)")
            last.append(time.perf_counter() - begin)
            page.close()
        browser.close()
    return {"ready_s": round(statistics.median(ready), 2), "ready_worst_s": round(max(ready), 2),
            "last_s": round(statistics.median(last), 3)}  # fmt: skip


if __name__ == "__main__":
    app.run(main)
