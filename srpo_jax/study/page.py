"""The page of a study: tables, a picture of the effects, warnings; all of it made by the command."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srpo_jax.study.analysis import RATES, Effect, Estimate, by_method, degenerate, effects, rates
from srpo_jax.study.design import BASE, Design

TITLES = {"SE": "S&E", "S": "S", "E": "E", "helpful": "harmless helped", "over_refusal": "over-refusal"}
PLAN = {"updates": "equal updates", "flops": "equal FLOPs, exploration included"}


def render(
    design: Design,
    rows: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, int],
    clusters: Mapping[str, Sequence[str]],
    planned: int,
    command: str,
    picture: str,
) -> tuple[str, str]:
    """The page in Markdown and its picture in SVG.

    Args:
      design: of the study.
      rows: the test runs that are there.
      chosen: the tuned trial of every method.
      clusters: of the test prompts, by endpoint.
      planned: test runs of the whole study.
      command: that made the page.
      picture: name of the picture's file.
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
    for budget in design.budgets:
        parts.append(f"## {PLAN[budget].capitalize()}\n\n" + _rates_table(groups, design, clusters, budget))
    parts.append(f"## {design.method} less the others\n\n![effects]({picture})\n\n" + _effects_table(found, design))
    parts.append("## Degenerate ends\n\n" + _warnings(groups))
    if chosen:
        picked = "\n".join(f"* {name}: {dict(design.trials[name][trial])}" for name, trial in chosen.items())
        parts.append(
            f"## Chosen on the validation split\n\nBefore any test seed ran, of as many trials for each:\n\n{picked}"
        )
    return "\n\n".join(parts) + "\n", svg(found)


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def _rates_table(groups, design: Design, clusters, budget: str) -> str:
    lines = []
    for name in (BASE, *design.methods):
        # The method and the base policy cost the same under every budget.
        rows = groups.get((name, budget)) or (
            groups.get((name, design.budgets[0])) if name in (BASE, design.method) else None
        )
        if rows:
            cells = [_percent(x) for x in rates(rows, clusters).values()]
            cost = [f"{np.mean([r['updates'] for r in rows]):.0f}", f"{np.mean([r['flops'] for r in rows]):.2g}"]
            cost.append(f"{np.mean([r['generated_tokens'] for r in rows]):,.0f}")
            lines.append([name, *cells, *cost, f"{np.mean([r['length'] for r in rows]):.0f}", str(len(rows))])
    return _table(
        [
            "method",
            *(TITLES[name] for name in RATES),
            "updates",
            "FLOPs",
            "tokens explored",
            "tokens per answer",
            "seeds",
        ],
        lines,
    )


def _effects_table(found: Sequence[Effect], design: Design) -> str:
    lines = []
    for e in found:
        p = "" if e.p is None else f"{e.p:.3f} ({e.adjusted:.3f})"
        lines.append([e.against, PLAN[e.budget], TITLES[e.endpoint], _percent(e.estimate), p])
    note = "" if design.confirmatory else "\n\nAn exploration: no p-values."
    return _table(["against", "budget", "endpoint", "difference in points", "p (Holm)"], lines) + note


def _warnings(groups) -> str:
    base = next((rows for (name, _), rows in groups.items() if name == BASE), None)
    if base is None:
        return "No run of the base policy yet."
    lines = []
    for (name, budget), rows in groups.items():
        if name != BASE:
            lines += [f"* {name}, {PLAN[budget]}: {text}" for text in degenerate(rows, base)]
    return "\n".join(lines) or "None found."


def svg(found: Sequence[Effect]) -> str:
    """Differences and their intervals, one line each, around zero."""
    row, left, width = 22, 300, 360
    reach = max([0.05, *(abs(x) for e in found for x in (e.estimate.low, e.estimate.high))])

    def at(x: float) -> float:
        return left + width / 2 * (1 + x / reach)

    lines = []
    for i, e in enumerate(found):
        y, label = 30 + i * row, html.escape(f"{TITLES[e.endpoint]} against {e.against} ({e.budget})")
        colour = "#1a6" if e.estimate.low > 0 else "#b33" if e.estimate.high < 0 else "#555"
        x1, x, x2 = (f"{at(v):.1f}" for v in (e.estimate.low, e.estimate.value, e.estimate.high))
        lines.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{label}</text>'
            f'<line x1="{x1}" x2="{x2}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
        )
    height = 30 + len(found) * row + 20
    axis = f'<line x1="{at(0)}" x2="{at(0)}" y1="14" y2="{height - 24}" stroke="#999" stroke-dasharray="3 3"/>'
    ticks = "".join(
        f'<text x="{at(x):.1f}" y="{height - 8}" text-anchor="middle">{100 * x:+.0f}</text>' for x in (-reach, 0, reach)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{axis}{"".join(lines)}{ticks}</svg>\n'
    )
