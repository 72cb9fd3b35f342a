"""Promises of a study's design and arithmetic: fairness by construction, intervals that cover, warnings that fire."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from srpo_jax import config as configs
from srpo_jax.study import plots
from srpo_jax.study.analysis import choose, degenerate, effects, hierarchical, rates
from srpo_jax.study.design import BASE, Cell, Design, StudyError, cell_config, measured_cells, read_design, tuning_cells
from srpo_jax.study.page import render

FOLDER = Path(__file__).parents[2] / "configs" / "study"
FILES = sorted(FOLDER.glob("*.py"))
SMALL = Design({"sft": {}, "srpo": {}}, {}, seeds=2, confirmatory=False)


def load(file: Path):
    spec = importlib.util.spec_from_file_location(f"study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_of_every_study_has_a_configuration_that_resolves(file):
    """Overrides are known fields, and all methods of a seed read the same records and answer the same prompts."""
    config = load(file)
    design = read_design(config)
    cells = [*tuning_cells(design), *(c for c in measured_cells(design) if c.seed == 0 and c.method != BASE)]
    assert {c.method for c in cells} == design.methods.keys()
    seen = set()
    for cell in cells:
        changed, _ = cell_config(config, design, cell, cell.trial)
        run = configs.run_config(changed)
        assert run.seed == changed.data.seed == changed.eval.seed == cell.seed
        if cell.trial is None and design.confirmatory:
            seen.add((run.updates * max(1, run.rounds), run.batch, changed.data.n, changed.eval.n))
    assert len(seen) <= 1  # the same number of updates for all
    header = file.read_text().split('"""')[1]
    assert "python scripts/study.py" in header


def test_the_confirmatory_study_is_fixed_and_fair():
    design = read_design(load(FOLDER / "main.py"))
    assert design.seeds >= 12 and design.confirmatory and set(design.against) == design.methods.keys() - {"srpo"}
    assert {len(design.trials[name]) for name in design.methods} == {4}
    assert {c.seed for c in tuning_cells(design)}.isdisjoint(c.seed for c in measured_cells(design))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"against": ("dop",)}, r"\['dop'\] is no method"),
        ({"budgets": ("hours",)}, r"budgets: \{'hours'\} is none of|budgets: "),
        ({"trials": {"sft": ({},)}}, r"same number of tuning trials, not \{'sft': 1, 'srpo': 0\}"),
        ({"confirmatory": True, "seeds": 11}, r"seeds=11: tests need 12"),
    ],
)
def test_an_unfair_or_impossible_design_is_refused(fields, message):
    with pytest.raises(StudyError, match=message):
        Design(**{"methods": SMALL.methods, "trials": {}, "confirmatory": False, **fields})


def test_an_override_of_no_field_is_named():
    design = Design({"srpo": {"loss": {"srpo": {"lamda": 1.0}}}}, {}, confirmatory=False)
    config = load(FOLDER / "main.py")
    with pytest.raises(StudyError, match=r"config\.study: srpo: .*lamda"):
        cell_config(config, design, Cell("srpo", "updates", 0), None)


def test_the_interval_covers_a_mean_of_correlated_outcomes():
    """Seeds and combinations both shift the rate: resampling prompts alone would be far too sure of itself."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    clusters = [f"c{i // 5}" for i in range(100)]
    for trial in range(120):
        p = 0.5 + rng.normal(scale=0.1, size=(12, 1)) + np.repeat(rng.normal(scale=0.15, size=20), 5)
        outcomes = rng.random((12, 100)) < np.clip(p, 0, 1)
        found = hierarchical(outcomes, clusters, resamples=300, seed=trial)
        covered += found.low <= 0.5 <= found.high
        half = 1.96 * np.sqrt(0.25 / outcomes.size)
        alone += abs(outcomes.mean() - 0.5) <= half
    assert covered / 120 > 0.85 > alone / 120


def test_an_interval_without_variation_is_a_point():
    found = hierarchical([[1, 1, 0, 0]] * 3, ["a", "b", "a", "b"])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="do not make a table"):
        hierarchical([[1, 0]], ["a"])


def row(method, seed, rate, budget="updates", **more):
    rng = np.random.default_rng([seed, int(1000 * rate)])
    told = {name: (rng.random(40) < rate).astype(int).tolist() for name in ("SE", "S", "E", "helpful")}
    told |= {"over_refusal": [0] * 40, "malformed": 0.0, "copied": 0.0, "distinct": 0.9, "gap": 0.0, "length": 60.0}
    return {
        "method": method,
        "budget": budget,
        "seed": seed,
        "trial": None,
        "updates": 4,
        "flops": 1e9,
        "generated_tokens": 9,
        **told,
        **more,
    }


def test_effects_are_paired_by_seed_tested_where_named_and_adjusted():
    design = Design({"sft": {}, "dpo": {}, "srpo": {}}, {}, against=("sft", "dpo"))
    rows = {(m, "updates"): [row(m, s, r) for s in range(12)] for m, r in (("sft", 0.4), ("dpo", 0.7), ("srpo", 0.7))}
    clusters = {name: [f"c{i % 8}" for i in range(40)] for name in ("SE", "helpful")}
    found = {(e.against, e.endpoint): e for e in effects(rows, design, clusters)}
    assert len(found) == 4
    strong, none = found["sft", "SE"], found["dpo", "SE"]
    srpo, sft = (np.mean([r["SE"] for r in rows[name, "updates"]]) for name in ("srpo", "sft"))
    assert strong.estimate.value == pytest.approx(srpo - sft)
    assert strong.p < 0.01 and strong.estimate.low > 0 and none.estimate.low <= 0 <= none.estimate.high
    assert all(e.adjusted >= e.p for e in found.values())
    explored = Design({"sft": {}, "srpo": {}}, {}, against=("sft",), seeds=3, confirmatory=False)
    assert all(e.p is None and e.adjusted is None for e in effects(rows, explored, clusters))


def test_tuning_does_not_choose_refuse_everything():
    rows = [row("sft", 0, 0.6) | {"trial": 0}, row("sft", 0, 0.9) | {"trial": 1, "SE": [0] * 40, "helpful": [0] * 40}]
    assert choose(rows) == {"sft": 0}
    assert choose([r | {"trial": 1 - r["trial"]} for r in rows]) == {"sft": 1}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"over_refusal": [1] * 20 + [0] * 20}, "refuses 50% of harmless"),
        ({"length": 100.0}, "1.67 times as long"),
        ({"length": 20.0}, "0.33 times as long"),
        ({"malformed": 0.2}, "20% malformed"),
        ({"copied": 0.5}, "50% copy a training path"),
        ({"distinct": 0.1}, "only 10% of answers differ"),
        ({"gap": 0.2}, r"judge of training sees +20.0%"),
        ({"helpful": [0] * 40}, "fewer harmless requests"),
    ],
)
def test_every_degenerate_end_is_told(change, text):
    base = [row(BASE, s, 0.6) for s in range(3)]
    assert degenerate([row("x", s, 0.6) for s in range(3)], base) == []
    assert any(text in found for found in degenerate([row("x", s, 0.6, **change) for s in range(3)], base))


def test_the_page_tells_what_is_missing_and_escapes_names():
    rows = [row(m, s, 0.5) for m in (BASE, "sft", "srpo") for s in range(2)]
    clusters = {name: ["a", "b"] * 20 for name in ("SE", "helpful")}
    text, pictures = render(SMALL, rows, {}, clusters, 8, "python scripts/study.py --config=x", "x")
    assert (
        "**incomplete: 6 of 8 test runs**" in text and "An exploration: no p-values." in text and "None found." in text
    )
    assert all(f"({name})" in text and drawn.startswith("<svg") for name, drawn in pictures.items())
    assert pictures["x_effects.svg"].count("<circle") == 4  # base and sft, two endpoints
    assert pictures["x_updates.svg"].count("<circle") == 3  # base, sft, srpo
    design = Design({"<b>": {}, "srpo": {}}, {}, seeds=1, confirmatory=False)
    found = effects({(m, "updates"): [row(m, 0, 0.5)] for m in ("<b>", "srpo")}, design, clusters)
    one = {"<b>": rates([row("<b>", 0, 0.5)], clusters)}
    for drawn in (plots.effects(found), plots.frontier(one)):
        assert "<b>" not in drawn and "&lt;b&gt;" in drawn
