"""Compares training methods in the embedded world: tune each on validation, run all test seeds, write the page.

python scripts/study.py --config=configs/study/main.py --workdir=runs/study [--page=docs/study_results.md] [--seeds=2]
[--methods=sft,srpo]

Killed, the same command goes on; `--page` alone reads what is there. `--seeds` and `--methods` stop after a part, which
the next call completes; the design stays that of the configuration. Several processes share the runs: start the same
command once per accelerator, or once per core (`taskset -c 0 python scripts/study.py ...`, `taskset -c 1 ...`).
"""

import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.evaluation import config as evaluation
from srpo_jax.files import claim, write_json
from srpo_jax.study.analysis import choose
from srpo_jax.study.cells import Bench, run_cell, share_out
from srpo_jax.study.design import BASE, measured_cells, read_design, tuning_cells
from srpo_jax.study.page import render
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/study/main.py", "What to study.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep everything; the same command resumes it.", required=True)
PAGE = flags.DEFINE_string("page", None, "Where to write the page; its pictures lie beside it.")
SEEDS = flags.DEFINE_integer("seeds", None, "Stop after so many test seeds; default: all of the design.", lower_bound=0)
METHODS = flags.DEFINE_list("methods", None, "Run these alone; default: all of the design.")


def main(_):
    if not jax.config.values["jax_compilation_cache_dir"]:  # runs of a method, and restarts, share their programs
        jax.config.update("jax_compilation_cache_dir", str(Path(WORKDIR.value).absolute() / "programs"))
    config = CONFIG.value
    design = read_design(config)
    workdir = open_workdir(WORKDIR.value, config, shared=True)
    mesh = configs.build_mesh(config)
    bench = Bench(config, design, configs.build_policy(config, mesh), mesh, workdir)
    wanted = {BASE, *(METHODS.value or design.methods)}
    chosen = tuned(bench, [cell for cell in tuning_cells(design) if cell.method in wanted])
    cells = list(measured_cells(design))
    seeds = design.seeds if SEEDS.value is None else SEEDS.value
    part = [cell for cell in cells if cell.seed < seeds and cell.method in wanted]
    # The first runs of a seed set the budget of its later ones, if there is a second budget.
    groups = [f"seed{cell.seed}" if len(design.budgets) > 1 else cell.name for cell in part]
    run_all(bench, part, [chosen.get(cell.method) for cell in part], groups)
    with claim(workdir / "claims" / "page", wait=True):
        write_page(bench, cells, chosen)


def tuned(bench, cells):
    """The chosen trial of every method. A choice is kept once made: test runs depend on it."""
    file = bench.workdir / "chosen.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    cells = [cell for cell in cells if cell.method not in known]
    run_all(bench, cells, [cell.trial for cell in cells], [f"tune-{cell.method}" for cell in cells])
    with claim(bench.workdir / "claims" / "chosen", wait=True):  # others may have chosen in between
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known |= choose([run_cell(bench, cell, cell.trial) for cell in cells if cell.method not in known])
        write_json(file, known)
    alone = {name: 0 for name, trials in bench.design.trials.items() if len(trials) == 1}
    return alone | known


def run_all(bench, cells, trials, groups):
    """Runs cells with their trials, those of a group by one process and in order; returns when all are there."""
    work = defaultdict(list)
    for number, (cell, trial, group) in enumerate(zip(cells, trials, groups, strict=True), 1):
        work[group].append((f"{number}/{len(cells)}", cell, trial))
    share_out(bench.workdir / "claims", {group: partial(run_group, bench, mine) for group, mine in work.items()})


def run_group(bench, numbered):
    for number, cell, trial in numbered:
        row = run_cell(bench, cell, trial)
        told = f"S&E {share(row['SE'])}, helped {share(row['helpful'])}, {row['seconds']:.0f} s"
        print(f"{number} {cell.name}: {told}", flush=True)


def write_page(bench, cells, chosen):
    rows = [run_cell(bench, cell, None) for cell in cells if (bench.workdir / "cells" / f"{cell.name}.json").exists()]
    if rows:
        page = Path(PAGE.value or bench.workdir / "study.md")
        told = "python " + " ".join(command())
        text, pictures = render(bench.design, rows, chosen, clusters_of(bench.config), len(cells), told, page.stem)
        page.write_text(text, encoding="utf-8")
        for name, drawn in pictures.items():
            (page.parent / name).write_text(drawn, encoding="utf-8")
        print(f"{len(rows)} of {len(cells)} test runs are in {page}")


def clusters_of(config):
    """Combinations of state and activity of the test prompts, by endpoint."""
    section = configs.eval_section(config)
    records = evaluation.build_benchmark(section, configs.build_difficulty(config))
    names = [
        (record.risky, f"{record.meta['object']} {record.meta['state']} {record.meta['activity']}")
        for record in records
    ]
    return {"SE": [name for risky, name in names if risky], "helpful": [name for risky, name in names if not risky]}


def share(outcomes):
    return f"{sum(outcomes) / len(outcomes):.1%}"


def command():
    """The command line as a reader would type it, without the page's own flag."""
    return ["scripts/study.py", *(arg for arg in sys.argv[1:] if not arg.startswith("--page"))]


if __name__ == "__main__":
    cli.run(main)
