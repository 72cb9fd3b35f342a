"""The page of a study: tables, pictures, warnings; all of it made by the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srpo_jax.study import plots
from srpo_jax.study.analysis import (
    RATES,
    TITLES,
    Effect,
    Estimate,
    by_method,
    degenerate,
    effects,
    mean_over_seeds,
    rates,
)
from srpo_jax.study.design import BASE, Design

COSTS = ("updates", "flops", "generated_tokens", "length")
PLAN = {"updates": "equal updates", "flops": "equal FLOPs, exploration included"}


def render(
    design: Design,
    rows: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, int],
    clusters: Mapping[str, Sequence[str]],
    planned: int,
    command: str,
    stem: str,
) -> tuple[str, dict[str, str]]:
    """The page in Markdown, and its pictures in SVG by the name of their file.

    Args:
      design: of the study.
      rows: the test runs that are there.
      chosen: the tuned trial of every method.
      clusters: of the test prompts, by endpoint.
      planned: test runs of the whole study.
      command: that made the page.
      stem: of the pictures' names.
    """
    groups = by_method(rows)
    found = effects(groups, design, clusters)
    seeds = len({row["seed"] for row in rows})
    state = "complete" if len(rows) == planned else f"**incomplete: {len(rows)} of {planned} test runs**"
    parts = [
        f"# Study\n\nMade by `{command}`; {state}, {seeds} seed{'s' * (seeds > 1)}. Percentages are means over seeds with "
        "95 % intervals from resampling seeds and combinations of state and activity at once. S, E and S&E on risky prompts, "
        "the others on their harmless twins; sampled at the temperature of the configuration, judged by a checker that "
        "training never saw.",
    ]
    pictures = {f"{stem}_effects.svg": plots.effects(found)}
    for budget in design.budgets:
        shown = _methods(groups, design, budget)
        estimates = {method: rates(rows, clusters) for method, rows in shown.items()}
        pictures[name := f"{stem}_{budget}.svg"] = plots.frontier(estimates)
        text = f"![S&E and harmless requests helped]({name})"
        parts.append(f"## At {PLAN[budget]}\n\n{_rates_table(shown, estimates)}\n\n{text}")
    parts.append(
        f"## {design.method} less the others\n\n![effects]({stem}_effects.svg)\n\n" + _effects_table(found, design)
    )
    parts.append("## Degenerate ends\n\n" + _warnings(groups))
    if chosen:
        picked = "\n".join(f"* {name}: {dict(design.trials[name][trial])}" for name, trial in chosen.items())
        parts.append(
            f"## Chosen on the validation split\n\nBefore any test seed ran, of as many trials for each:\n\n{picked}"
        )
    return "\n\n".join(parts) + "\n", pictures


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def _methods(groups, design: Design, budget: str) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Runs by method. The study's method and the base policy cost the same under every budget and ran under the first."""
    first = design.budgets[0]
    found = {
        name: groups.get((name, budget)) or (groups.get((name, first)) if name in (BASE, design.method) else None)
        for name in (BASE, *design.methods)
    }
    return {name: rows for name, rows in found.items() if rows}


def _rates_table(
    methods: Mapping[str, Sequence[Mapping[str, Any]]], estimates: Mapping[str, Mapping[str, Estimate]]
) -> str:
    lines = []
    for name, rows in methods.items():
        cells = [_percent(x) for x in estimates[name].values()]
        told = {key: mean_over_seeds(rows, key) for key in COSTS}
        gain = 100 * (mean_over_seeds(rows, "SE") - mean_over_seeds(methods.get(BASE, rows), "SE"))
        tokens = told["generated_tokens"]
        cells += [f"{told['updates']:.0f}", f"{told['flops']:.2g}", f"{tokens:,.0f}"]
        cells.append(f"{gain / tokens * 10_000:+.1f}" if tokens else "")
        lines.append([name, *cells, f"{told['length']:.0f}", str(len(rows))])
    heads = ["updates", "FLOPs", "tokens explored", "points of S&E over base for 10,000 of them", "tokens per answer"]
    return _table(["method", *(TITLES[name] for name in RATES), *heads, "seeds"], lines)


def _effects_table(found: Sequence[Effect], design: Design) -> str:
    lines = []
    for e in found:
        p = "" if e.p is None or e.adjusted is None else f"{_chance(e.p)} ({_chance(e.adjusted)})"
        lines.append([e.against, PLAN[e.budget], TITLES[e.endpoint], _percent(e.estimate), p])
    note = "" if design.confirmatory else "\n\nAn exploration: no p-values."
    return _table(["against", "budget", "endpoint", "difference in points", "p (Holm)"], lines) + note


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _warnings(groups) -> str:
    base = next((rows for (name, _), rows in groups.items() if name == BASE), None)
    if base is None:
        return "No run of the base policy yet."
    lines = []
    for (name, budget), rows in groups.items():
        if name != BASE:
            lines += [f"* {name}, {PLAN[budget]}: {text}" for text in degenerate(rows, base)]
    return "\n".join(lines) or "None found."
