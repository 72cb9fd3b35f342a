"""Figures as SVG: shapes and numbers only, colours by class, so that one style sheet serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from srpo_jax.evaluation.report.assemble import Contents

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 20, 52
PITCH, TALLEST = 35, 78
SHORT = {"unknown": "?", "malformed": "–"}


def trade_off(contents: Contents) -> Markup:
    """Harm (1 - S on risky prompts) against over-refusal, with 95 % intervals and an arrow from each baseline; may be ""."""
    points = {i: p for i, row in enumerate(contents.rows) if (p := _point(row.entry)) is not None}
    if not points:
        return Markup("")
    across = _scale(max(p["x"][2] for p in points.values()), LEFT, WIDTH - RIGHT)
    up = _scale(max(p["y"][2] for p in points.values()), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up)]
    for one in contents.comparisons:
        if one["row"] in points and one["baseline_row"] in points:
            ends = [(across(points[i]["x"][1]), up(points[i]["y"][1])) for i in (one["baseline_row"], one["row"])]
            parts.append(_arrow(*ends))
    heights = _apart([(i, up(p["y"][1])) for i, p in points.items()])
    for place, point in points.items():
        label = contents.rows[place].label
        parts.append(_mark(point, across, up, heights[place], label, f"s{series(contents, place)}"))
    return _svg(parts, "Harm against over-refusal: lower left is better")


def _point(entry: Mapping[str, Any]) -> dict[str, tuple[float, float, float]] | None:
    """Low, value and high of both rates; None without risky or harmless prompts."""
    harm, refusal = entry.get("S"), entry.get("over_refusal")
    if not harm or not refusal or harm["rate"] is None or refusal["rate"] is None:
        return None
    return {
        "x": (refusal["low"], refusal["rate"], refusal["high"]),
        "y": (1 - harm["high"], 1 - harm["rate"], 1 - harm["low"]),
    }


def series(contents: Contents, place: int) -> int:
    """A colour per policy name, whatever its decoding."""
    names = list(dict.fromkeys(row.entry["name"] for row in contents.rows))
    return names.index(contents.rows[place].entry["name"]) % 6


class _scale:
    """From shares in [0, top] to pixels; `ticks` are round numbers."""

    def __init__(self, top: float, start: float, end: float):
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if top <= 5 * s or s == 0.25)
        count = max(1, min(math.ceil(top / step - 1e-9), round(1 / step)))
        self.ticks = [step * i for i in range(count + 1)]
        self._start, self._end, self._top = start, end, self.ticks[-1]

    def __call__(self, share: float) -> float:
        return round(self._start + (self._end - self._start) * min(share, self._top) / self._top, 1)


def _axes(across: _scale, up: _scale) -> Markup:
    parts = []
    for tick in across.ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{100 * tick:g}</text>'
        )
    for tick in up.ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{100 * tick:g}</text>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">over-refusal, % of harmless</text>'
    )
    turn = f"rotate(-90 16 {centre})"
    parts.append(
        f'<text class="axis" x="16" y="{centre}" transform="{turn}" text-anchor="middle">harm, % of risky</text>'
    )
    return Markup("".join(parts))


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    length = math.dist(start, end)
    if length < 24:  # the two marks touch
        return Markup("")
    (x0, y0), (x1, y1) = (
        [a + (b - a) * t for a, b in zip(start, end, strict=True)] for t in (9 / length, 1 - 11 / length)
    )
    line = f'<line class="arrow" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" marker-end="url(#head)"/>'
    return Markup(line)


def _mark(point, across: _scale, up: _scale, height: float, label: str, series: str) -> Markup:
    (x_low, x, x_high), (y_low, y, y_high) = ([f(v) for v in point[k]] for k, f in (("x", across), ("y", up)))
    edge = WIDTH - RIGHT
    return Markup(
        '<g class="{s}"><line class="range" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
        '<line class="range" x1="{x}" x2="{x}" y1="{c}" y2="{d}"/><line class="lead" x1="{x}" y1="{y}" x2="{edge}" y2="{h}"/>'
        '<circle class="dot" cx="{x}" cy="{y}" r="6"/><text class="name" x="{text}" y="{t}">{label}</text></g>'
    ).format(s=series, a=x_low, b=x_high, c=y_low, d=y_high, x=x, y=y, edge=edge, h=height, text=edge + 6, t=height + 4,
             label=_short(label))  # fmt: skip


def _apart(heights: Sequence[tuple[int, float]], gap: float = 17) -> dict[int, float]:
    """Moves labels so that none covers another, each as near to its height as that allows."""
    placed: dict[int, float] = {}
    last = -math.inf
    for place, height in sorted(heights, key=lambda pair: pair[1]):
        last = max(height, last + gap)
        placed[place] = last
    floor = float(HEIGHT - BOTTOM)
    for place in reversed(placed):  # what ran over the floor pushes its neighbours up again
        placed[place] = floor = min(placed[place], floor)
        floor -= gap
    return placed


def _short(label: str, length: int = 20) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def histogram(counts: Mapping[str, int], row: int) -> Markup:
    """Risky responses by the step at which their path drifts first; every bar filters the sample browser when chosen."""
    # "none" may dwarf the steps: it does not set the scale, and its bar is cut off.
    top = max([count for name, count in counts.items() if name != "none"] + [1])
    total = sum(counts.values())
    bars = [_bar(place, name, count, top, total, row) for place, (name, count) in enumerate(counts.items())]
    width, height = PITCH * len(counts), TALLEST + 38
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = Markup(f'<svg class="histogram" {size} role="group" aria-label="First unsafe step">')
    return head + Markup("").join(bars) + Markup("</svg>")


def _bar(place: int, name: str, count: int, top: int, total: int, row: int) -> Markup:
    x, tall = PITCH * place, round(max(min(1.0, count / top) * TALLEST, 1.5), 1)
    middle, ground = x + PITCH / 2, TALLEST + 18
    kind = {"none": "good", "unknown": "open", "malformed": "open"}.get(name, "bad")
    told = f"{name}: {count} of {total} risky responses" + (" (bar cut off)" if count > top else "")
    group = Markup('<g class="bar {}" role="button" tabindex="0" data-row="{}" data-drift="{}"><title>{}</title>')
    return group.format(kind, row, name, told) + Markup(
        f'<rect class="hit" x="{x}" y="0" width="{PITCH}" height="{ground + 20}"/>'
        f'<rect class="{"fade" if count > top else ""}" x="{x + 5}" y="{ground - tall}" width="{PITCH - 10}" height="{tall}" '
        'rx="3"/>'
        f'<text class="count" x="{middle}" y="{ground - tall - 5}" text-anchor="middle">{count}</text>'
        f'<text class="tick" x="{middle}" y="{ground + 15}" text-anchor="middle">{SHORT.get(name, name)}</text></g>'
    )


def interval(rate: Mapping[str, Any]) -> Markup:
    """A rate's 95 % interval as a small bar from 0 to 1."""
    low, value, high = (round(60 * rate[key], 1) for key in ("low", "rate", "high"))
    return Markup(
        f'<svg class="interval" viewBox="-3 0 66 8" width="66" height="8" aria-hidden="true"><rect class="track" x="0" y="3" '
        f'width="60" height="2" rx="1"/><rect class="span" x="{low}" y="2" width="{max(high - low, 1):.1f}" height="4" rx="2"/>'
        f'<circle class="at" cx="{value}" cy="4" r="3"/></svg>'
    )


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    head = '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path class="arrowhead" d="M0 0L8 4L0 8z"/></marker></defs>'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return (
        Markup(f'<svg class="plot" {size} role="img" aria-label="{escape(title)}">{head}')
        + Markup("").join(parts)
        + Markup("</svg>")
    )
