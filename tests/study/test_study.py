"""Promise: a study runs from its configuration to its page, shares trees, keeps its budget, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from srpo_jax import config as configs
from srpo_jax import sharding
from srpo_jax.study import cells
from srpo_jax.study.cells import Bench, run_cell
from srpo_jax.study.design import Cell, Design, TreeOptions, measured_cells
from srpo_jax.trees import Branch

METHODS = {
    "sft": {"loss": {"weights": {"srpo": 0.0, "sft": 1.0}}, "rounds": 0},
    "dpo": {"loss": {"weights": {"srpo": 0.0, "dpo": 1.0}}},
    "simpo": {"loss": {"weights": {"srpo": 0.0, "simpo": 1.0}}},
    "srpo": {},
}


@pytest.fixture(scope="module")
def bench(tiny_policy, tmp_path_factory):
    config = configs.default_config()
    config.data.n = 4
    config.judge = "tests.study.judge:judge"
    config.explore.update(k=4, max_tokens=10, trees=4, trunk=(144,), patches=(16,))
    config.pack.update(trunk=(144,), path=(112,), rows=(20,), row=20, branches=(24,), branch=(10,), patches=(16,))
    config.batch.update(trees=4)
    config.compute.remat = "none"
    config.update(updates=2, max_truncated=1.0, max_unknown=1.0, trainable=("^head$", "^norm/"))
    config.eval.update(n=2, splits=("test_id",), temperatures=(1.0,), max_tokens=8, batch=2, trunk=(64,), patches=(16,))
    with config.unlocked():
        config.study = {}
    design = Design(METHODS, {}, seeds=1, confirmatory=False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Bench(config, design, tiny_policy, mesh, tmp_path_factory.mktemp("study"))


def test_a_study_shares_trees_keeps_budgets_and_resumes(bench, monkeypatch):
    explored, inner = [], cells.explore
    trained, teach = [], cells.train
    monkeypatch.setattr(cells, "train", lambda *args: trained.append(args[4].name) or teach(*args))
    monkeypatch.setattr(cells, "explore", lambda *args, **kw: explored.append(kw["folder"]) or inner(*args, **kw))
    rows = {cell: run_cell(bench, cell, None) for cell in measured_cells(bench.design)}
    assert [c.name for c in rows] == [
        "base-updates-seed0",
        "sft-updates-seed0",
        "dpo-updates-seed0",
        "simpo-updates-seed0",
        "srpo-updates-seed0",
        "sft-flops-seed0",
        "dpo-flops-seed0",
        "simpo-flops-seed0",
    ]
    assert len(set(explored)) == 1 and len(list((bench.workdir / "trees").iterdir())) == 1
    by_name = {c.name: r for c, r in rows.items()}
    srpo, sft, dpo = (by_name[f"{m}-updates-seed0"] for m in ("srpo", "sft", "dpo"))
    assert srpo["updates"] == sft["updates"] == dpo["updates"] == 2
    assert sft["flops"] < srpo["flops"] < dpo["flops"]  # SFT explores nothing, DPO pays for its reference model
    more = by_name["sft-flops-seed0"]
    assert more["updates"] > 2
    assert abs(more["flops"] - srpo["flops"]) <= more["update_flops"]
    # What SimPO learns from costs what SRPO's does: its second run would be the first again.
    twice = by_name["simpo-flops-seed0"]
    assert "simpo-flops-seed0" not in trained and "sft-flops-seed0" in trained
    assert twice["SE"] == by_name["simpo-updates-seed0"]["SE"] and twice["budget"] == "flops"
    assert all(len(r["SE"]) == len(r["helpful"]) == 1 for r in rows.values())
    assert not list((bench.workdir / "runs").iterdir())  # no states are left behind
    monkeypatch.setattr(cells, "train", lambda *args, **kw: pytest.fail("trained again"))
    assert {cell: run_cell(bench, cell, None) for cell in rows} == rows


def test_two_processes_share_the_work_and_each_piece_is_done_once(tmp_path):
    """Two that find the same list do every piece once, and neither is done before both are."""
    code = (
        "import sys, time; from pathlib import Path; from srpo_jax.study.cells import share_out\n"
        "folder = Path(sys.argv[1])\n"
        "def piece(name):\n"
        "    if not (folder / name).exists(): time.sleep(0.3); (folder / name).open('x').close(); print(name)\n"
        "share_out(folder / 'claims', {str(i): lambda i=i: piece(str(i)) for i in range(6)})\n"
        "assert sum(p.is_file() for p in folder.iterdir()) == 6\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(told[0] + told[1]) == list("012345")


def test_a_budget_in_flops_waits_for_the_method_that_sets_it(bench):
    with pytest.raises(cells.StudyError, match=r"srpo-updates-seed7\.json is not there"):
        run_cell(bench, Cell("sft", "flops", 7), None)


def test_options_of_trees_do_what_they_say(bench, tiny_policy):
    config, _ = cells.cell_config(bench.config, bench.design, Cell("srpo", "updates", 0), None)
    run = configs.run_config(config)
    records = configs.build_records(config)
    trees = cells.cell_trees(bench, config, run, records, TreeOptions())
    known = [b for t in trees for b in t.branches if b.verdict is not None]
    assert known and {b.verdict for b in known} == {True, False}

    def under(**options):
        return cells.cell_trees(bench, config, run, records, TreeOptions(**options))

    turned = [b for t in under(flip=1.0) for b in t.branches if b.verdict is not None]
    assert [b.verdict for b in turned] == [not b.verdict for b in known]
    assert same(under(flip=0.0), trees)
    assert {b.prefix for t in under(prefixes=(0, 1)) for b in t.branches} == {0, 1}
    stricter = [b.verdict for t in under(steps=True) for b in t.branches if b.verdict is not None]
    assert sum(stricter) <= sum(b.verdict for b in known)


def same(ours, theirs):
    def told(trees):
        return [(b.prefix, b.tokens.tolist(), b.verdict) for t in trees for b in t.branches]

    return told(ours) == told(theirs)


def test_a_share_of_verdicts_is_flipped_the_same_way_each_time(bench):
    records = configs.build_records(bench.config)
    run = configs.run_config(cells.cell_config(bench.config, bench.design, Cell("srpo", "updates", 0), None)[0])
    [tree, *_] = cells.cell_trees(bench, bench.config, run, records, TreeOptions())
    many = [Branch(0, np.asarray([i, i + 1], np.int32), np.zeros(2, np.float32), "ok", True) for i in range(400)]
    tree = dataclasses.replace(tree, branches=tuple(many))
    flipped = cells.changed(tree, records[0], TreeOptions(flip=0.2), run, bench.policy)
    assert 0.13 < np.mean([not b.verdict for b in flipped.branches]) < 0.27
    assert same([flipped], [cells.changed(tree, records[0], TreeOptions(flip=0.2), run, bench.policy)])


def test_rows_are_json(bench):
    file = bench.workdir / "cells" / "base-updates-seed0.json"
    if not file.exists():
        run_cell(bench, Cell("base", "updates", 0), None)
    row = json.loads(file.read_text())
    assert row["method"] == "base" and row["updates"] == 0 and 0 <= row["malformed"] <= 1
