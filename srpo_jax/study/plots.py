"""The pictures of a study, as SVG: effects with their intervals, and S&E against harmless requests helped."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from srpo_jax.study.analysis import ENDPOINTS, TITLES, Effect, Estimate

ROW, LEFT, WIDTH = 22, 300, 360
SIDE, MARGIN, LEGEND = 360, 56, 220


def effects(found: Sequence[Effect]) -> str:
    """Differences and their intervals, one line each, around zero."""
    reach = max([0.05, *(abs(x) for e in found for x in (e.estimate.low, e.estimate.high))])

    def at(x: float) -> float:
        return LEFT + WIDTH / 2 * (1 + x / reach)

    lines = []
    for i, e in enumerate(found):
        y, label = 30 + i * ROW, html.escape(f"{TITLES[e.endpoint]} against {e.against} ({e.budget})")
        colour = "#1a6" if e.estimate.low > 0 else "#b33" if e.estimate.high < 0 else "#555"
        lines.append(
            _text(LEFT - 10, y + 4, label, "end")
            + _line(at(e.estimate.low), y, at(e.estimate.high), y, colour, 2)
            + f'<circle cx="{at(e.estimate.value):.1f}" cy="{y}" r="4" fill="{colour}"/>'
        )
    height = 30 + len(found) * ROW + 20
    axis = f'<line x1="{at(0)}" x2="{at(0)}" y1="14" y2="{height - 24}" stroke="#999" stroke-dasharray="3 3"/>'
    ticks = "".join(_text(at(x), height - 8, f"{100 * x:+.0f}", "middle") for x in (-reach, 0, reach))
    return _picture(LEFT + WIDTH + 30, height, axis + "".join(lines) + ticks)


def frontier(methods: Mapping[str, Mapping[str, Estimate]]) -> str:
    """S&E on risky prompts against harmless requests helped, a numbered point per method: up and right is better.

    Args:
      methods: rates of each; see `analysis.rates`.
    """
    y_of, x_of = ENDPOINTS
    (left, right), (bottom, top) = (_range([one[name] for one in methods.values()]) for name in (x_of, y_of))

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + SIDE * (x - left) / (right - left), 20 + SIDE * (1 - (y - bottom) / (top - bottom))

    shapes = []
    for tenth in range(round(10 * left), round(10 * right) + 1):
        x, _ = at(tenth / 10, bottom)
        shapes += [_line(x, 20, x, 20 + SIDE, "#ddd", 1), _text(x, SIDE + 36, f"{10 * tenth}", "middle")]
    for tenth in range(round(10 * bottom), round(10 * top) + 1):
        _, y = at(left, tenth / 10)
        shapes += [_line(MARGIN, y, MARGIN + SIDE, y, "#ddd", 1), _text(MARGIN - 6, y + 4, f"{10 * tenth}", "end")]
    for number, (name, told) in enumerate(methods.items(), 1):
        x, y = at(told[x_of].value, told[y_of].value)
        shapes.append(_line(*at(told[x_of].low, told[y_of].value), *at(told[x_of].high, told[y_of].value), "#9bb", 1))
        shapes.append(_line(*at(told[x_of].value, told[y_of].low), *at(told[x_of].value, told[y_of].high), "#9bb", 1))
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="#fff" fill-opacity="0.7" stroke="#1a6"/>')
        shapes.append(_text(x, y + 4, str(number), "middle"))
        shapes.append(_text(MARGIN + SIDE + 20, 30 + ROW * (number - 1), html.escape(f"{number}  {name}"), "start"))
    shapes.append(_text(MARGIN + SIDE / 2, SIDE + 54, f"{TITLES[x_of]}, %", "middle"))
    shapes.append(_text(MARGIN - 40, 12, html.escape(f"{TITLES[y_of]}, %"), "start"))
    return _picture(MARGIN + SIDE + LEGEND, max(SIDE + 64, 30 + ROW * len(methods)), "".join(shapes))


def _range(rates: Sequence[Estimate]) -> tuple[float, float]:
    """Whole tenths around all intervals."""
    return math.floor(10 * min(r.low for r in rates)) / 10, math.ceil(10 * max(r.high for r in rates) + 0.01) / 10


def _text(x: float, y: float, escaped: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _picture(width: float, height: float, shapes: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{shapes}</svg>\n'
    )
