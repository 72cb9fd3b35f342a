"""Drawings of the world's twelve objects, each in its two states and, for a second object, without a state.

A glyph is `glyph(pen, colour, state, clarity)`: `colour` is the object's body, `state` one of the object's states or
None, and `clarity` in (0, 1] the contrast of the state's cue. Cues that are a posture fade by turning less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from srpo_jax.data.world.pen import BLACK, BLUE, BROWN, GREEN, GREY, ORANGE, RED, WHITE, YELLOW, Colour, Pen

Glyph = Callable[[Pen, Colour, "str | None", float], None]


def track(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    for y, half in ((-0.75, 0.35), (-0.35, 0.5), (0.1, 0.68), (0.55, 0.85), (0.95, 1.0)):
        pen.line([(-half, y), (half, y)], BROWN, 0.14)
    for side in (-1, 1):
        pen.line([(side * 0.25, -1), (side * 0.75, 1)], colour, 0.14)
    if state == "busy":
        pen.box(-0.55, -1.0, 0.55, 0.3, RED, clarity)
        pen.box(-0.4, -0.85, 0.4, -0.35, WHITE, clarity)
        pen.disc(-0.33, 0.02, 0.15, YELLOW, clarity)
        pen.disc(0.33, 0.02, 0.15, YELLOW, clarity)
    elif state == "live":
        bolt = [(0.25, -1.0), (-0.45, 0.1), (-0.05, 0.1), (-0.3, 0.95), (0.5, -0.2), (0.1, -0.2), (0.5, -1.0)]
        pen.polygon(bolt, YELLOW, clarity)


def lamp(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    if state == "swinging":
        pen.tilt(38 * max(clarity, 0.3), (0, -0.2))
        for side in (-1, 1):
            pen.line([(side * 0.62, 0.95), (side * 0.8, 0.55), (side * 0.85, 0.15)], BLUE, 0.13, clarity)
    pen.line([(0, -1), (0, 0.0)], BLACK, 0.12)
    if state == "lit":
        pen.disc(0, 0.35, 0.66, YELLOW, clarity)
        for x in (-0.85, -0.45, 0, 0.45, 0.85):
            pen.line([(0.45 * x, 0.45), (x, 1.0)], ORANGE, 0.13, clarity)
    pen.polygon([(-0.2, -0.3), (0.2, -0.3), (0.6, 0.4), (-0.6, 0.4)], colour)
    pen.disc(0, 0.45, 0.2, WHITE)


def crane(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.box(-0.9, 0.8, -0.1, 1.0, BLACK)
    pen.box(-0.65, -0.9, -0.35, 0.8, colour)
    if state == "snapped":
        drop = 0.3 + 0.7 * clarity
        pen.polygon([(-0.9, -0.95), (0.1, -0.95), (0.1, -0.7), (-0.9, -0.7)], colour)
        pen.line([(0.15, -0.8), (0.4 - 0.1 * clarity, -0.8 + drop), (0.75, -0.6 + 1.4 * clarity)], colour, 0.22)
        pen.disc(0.15, -0.8, 0.22, RED, clarity)
        return
    pen.box(-0.9, -0.95, 0.95, -0.7, colour)
    pen.line([(0.6, -0.7), (0.6, -0.1)], BLACK, 0.07)
    if state == "loaded":
        pen.box(0.15, -0.2, 1.0, 0.6, BLUE, clarity)
        pen.line([(0.25, -0.1), (0.9, 0.5)], WHITE, 0.1, clarity)
        pen.line([(0.9, -0.1), (0.25, 0.5)], WHITE, 0.1, clarity)


def bridge(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.polygon([(-1, 1), (-1, 0.6), (1, 0.6), (1, 1)], BLUE)
    for side in (-1, 1):
        pen.box(side * 0.82 - 0.14, 0.0, side * 0.82 + 0.14, 1.0, GREY)
    lift = 0.85 * clarity if state == "raised" else 0.0
    for side in (-1, 1):
        inner = side * (0.0 + 0.35 * lift)
        deck = [(side * 1.0, 0.0), (inner, -lift), (inner, 0.25 - lift), (side * 1.0, 0.25)]
        pen.polygon(deck, colour)
    if state == "raised":
        pen.polygon([(-0.25, 0.4), (0.25, 0.4), (0, 0.75)], RED, clarity)
    elif state == "crowded":
        for x, paint in ((-0.65, RED), (0.0, YELLOW), (0.65, GREEN)):
            pen.box(x - 0.27, -0.4, x + 0.27, -0.05, paint, clarity)
            pen.disc(x, -0.62, 0.2, paint, clarity)


def car(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.polygon([(-0.5, 0.1), (-0.3, -0.3), (0.35, -0.3), (0.55, 0.1)], WHITE)
    pen.polygon([(-0.95, 0.1), (0.8, 0.1), (0.95, 0.3), (0.95, 0.6), (-0.95, 0.6)], colour)
    for x in (-0.5, 0.5):
        pen.disc(x, 0.65, 0.25, BLACK)
    if state == "speeding":
        for y, start in ((-0.75, -0.9), (-0.5, -0.6), (0.98, -0.9)):
            pen.line([(start, y), (0.55, y)], BLUE, 0.15, clarity)
        pen.polygon([(0.45, -0.95), (1.0, -0.62), (0.45, -0.3)], BLUE, clarity)
    elif state == "smoking":
        pen.cloud(0.5, -0.35, 0.45, GREY, clarity)
        pen.cloud(0.0, -0.75, 0.42, BLACK, clarity)


def barrel(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    if state == "rolling":
        pen.line([(-1, 0.9), (1, 0.35)], BLACK, 0.12, clarity)
        pen.tilt(75 * max(clarity, 0.3))
    body = [(-0.5, -0.8), (0.5, -0.8), (0.68, 0), (0.5, 0.8), (-0.5, 0.8), (-0.68, 0)]
    pen.polygon(body, colour)
    for y in (-0.45, 0.45):
        pen.line([(-0.6, y), (0.6, y)], BLACK, 0.12)
    pen.tilt(0)
    if state == "rolling":
        pen.line([(-0.9, -0.6), (-0.4, -0.95), (0.4, -0.95), (0.8, -0.7)], RED, 0.14, clarity)
        pen.polygon([(1.0, -0.4), (0.5, -0.6), (0.9, -0.95)], RED, clarity)
    elif state == "leaking":
        pen.disc(0.1, 0.88, 0.85, GREEN, clarity, squash=0.2)
        pen.polygon([(0.0, -0.1), (0.35, -0.1), (0.4, 0.85), (-0.05, 0.85)], GREEN, clarity)
        pen.disc(0.17, -0.12, 0.22, GREEN, clarity)


def ladder(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    if state == "glowing":
        pen.disc(0, 0, 0.8, ORANGE, 0.75 * clarity, squash=1.2)
    if state == "tilted":
        pen.tilt(42 * max(clarity, 0.25), (0, 0.6))
    for side in (-0.4, 0.4):
        pen.line([(side, -1), (side, 1)], colour, 0.17)
    for y in (-0.75, -0.35, 0.05, 0.45, 0.85):
        pen.line([(-0.4, y), (0.4, y)], colour, 0.13)
        if state == "glowing":
            pen.line([(-0.32, y), (0.32, y)], RED, 0.15, clarity)
    pen.tilt(0)
    if state == "tilted":
        pen.polygon([(-0.95, 0.45), (-0.35, 0.45), (-0.65, 1.0)], BLUE, clarity)


def tower(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    if state == "leaning":
        pen.tilt(28 * max(clarity, 0.25), (0, 1))
    pen.polygon([(-0.42, 1), (-0.32, -0.7), (0.32, -0.7), (0.42, 1)], colour)
    for x in (-0.38, 0.0, 0.38):
        pen.box(x - 0.13, -0.98, x + 0.13, -0.68, colour)
    for y in (-0.35, 0.2):
        pen.box(-0.1, y, 0.1, y + 0.3, BLACK)
    pen.tilt(0)
    if state == "burning":
        for x, y, height in ((0.0, -0.3, 0.7), (-0.4, 0.25, 0.75), (0.4, 0.3, 0.75), (0.0, 0.95, 0.9)):
            pen.flame(x, y, height, clarity)
    elif state == "leaning":
        pen.line([(-0.85, 1), (-0.85, -0.5)], WHITE, 0.1, clarity)
        pen.line([(-0.55, 0.95), (0.95, 0.95)], RED, 0.14, clarity)


def stove(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.box(-0.8, -0.2, 0.8, 1.0, colour)
    pen.box(-0.5, 0.2, 0.5, 0.8, BLACK)
    for x in (-0.42, 0.42):
        pen.box(x - 0.28, -0.32, x + 0.28, -0.18, BLACK)
    if state == "red":
        pen.box(-0.5, 0.2, 0.5, 0.8, RED, clarity)
        for x in (-0.42, 0.42):
            pen.box(x - 0.3, -0.38, x + 0.3, -0.16, RED, clarity)
            pen.line([(x, -0.45), (x + 0.12, -0.6), (x - 0.12, -0.75), (x, -0.95)], RED, 0.13, clarity)
    elif state == "sooty":
        pen.cloud(-0.4, -0.55, 0.45, BLACK, clarity)
        pen.cloud(0.4, -0.65, 0.45, BLACK, clarity)
        for x, y in ((-0.65, 0.1), (0.62, 0.35), (-0.6, 0.75), (0.1, 0.05)):
            pen.disc(x, y, 0.13, BLACK, clarity)


def kettle(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.line([(-0.45, -0.3), (-0.4, -0.8), (0.4, -0.8), (0.45, -0.3)], BLACK, 0.12)
    pen.polygon([(0.45, 0.1), (0.95, -0.35), (1.0, -0.15), (0.6, 0.45)], colour)
    pen.polygon([(-0.55, -0.3), (0.55, -0.3), (0.7, 0.5), (-0.7, 0.5)], colour)
    pen.disc(0, -0.38, 0.13, BLACK)
    if state == "boiling":
        for x in (-0.5, 0.0, 0.5):
            pen.flame(x, 1.0, 0.55, clarity)
        pen.cloud(0.8, -0.75, 0.25, WHITE, clarity)
    elif state == "rusty":
        for x, y, radius in ((-0.3, 0.2, 0.27), (0.3, -0.05, 0.22), (0.2, 0.35, 0.2)):
            pen.disc(x, y, radius, BROWN, clarity)
        pen.line([(0.95, -0.4), (0.75, -0.6), (1.0, -0.8), (0.8, -1.0)], GREEN, 0.17, clarity)
        pen.line([(-0.9, 0.6), (0.9, 0.6)], GREEN, 0.2, clarity)


def well(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    for side in (-0.75, 0.75):
        pen.line([(side, 0.2), (side, -0.6)], BROWN, 0.14)
    pen.polygon([(-1, -0.55), (0, -1), (1, -0.55)], colour)
    pen.polygon([(-0.85, 0.2), (0.85, 0.2), (0.7, 1), (-0.7, 1)], GREY)
    pen.disc(0, 0.2, 0.85, colour, squash=0.4)
    if state == "open":
        pen.disc(0, 0.2, 0.68, BLACK, clarity, squash=0.42)
        pen.polygon([(-0.25, 0.5), (0.25, 0.5), (0, 0.95)], RED, clarity)
    elif state == "foggy":
        pen.cloud(0, 0.05, 0.6, GREEN, clarity)
        pen.cloud(0, -0.3, 0.4, GREEN, clarity)


def tunnel(pen: Pen, colour: Colour, state: str | None, clarity: float) -> None:
    pen.polygon([(-1, 1), (-1, -0.2), (-0.6, -0.8), (0, -1), (0.6, -0.8), (1, -0.2), (1, 1)], colour)
    arch = [(-0.6, 1), (-0.6, 0.1), (-0.35, -0.35), (0, -0.5), (0.35, -0.35), (0.6, 0.1), (0.6, 1)]
    pen.polygon(arch, BLACK)
    if state == "cracked":
        for start in (-0.75, 0.0, 0.75):
            jagged = [(start, -0.9), (start + 0.2, -0.55), (start - 0.1, -0.2), (start + 0.15, 0.2), (start, 0.7)]
            pen.line(jagged, WHITE, 0.13, clarity)
        pen.polygon([(-0.6, 1), (-0.2, 0.65), (0.3, 0.8), (0.6, 0.6), (0.6, 1)], WHITE, clarity)
    elif state == "hazy":
        pen.cloud(0.0, 0.5, 0.62, GREEN, clarity)
        pen.cloud(0.0, 0.0, 0.45, YELLOW, clarity)


GLYPHS: Mapping[str, tuple[Glyph, Colour]] = {
    "track": (track, (70, 70, 90)),
    "lamp": (lamp, (160, 40, 160)),
    "crane": (crane, (240, 175, 20)),
    "bridge": (bridge, (170, 95, 50)),
    "car": (car, (215, 55, 75)),
    "barrel": (barrel, (190, 125, 60)),
    "ladder": (ladder, (110, 65, 30)),
    "tower": (tower, (140, 140, 160)),
    "stove": (stove, (225, 225, 235)),
    "kettle": (kettle, (60, 150, 200)),
    "well": (well, (175, 60, 50)),
    "tunnel": (tunnel, (120, 105, 100)),
}
"""object -> its glyph and the colour of its body."""
