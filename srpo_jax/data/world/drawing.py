"""From a `Picture` to pixels: a place as background, clutter, and a large object in its state."""

from __future__ import annotations

import random

import PIL.Image
from PIL import ImageDraw

from srpo_jax.data.world.glyphs import GLYPHS
from srpo_jax.data.world.pen import BLACK, WHITE, Colour, Pen
from srpo_jax.data.world.splits import Picture

SIDE = 112
"""Width and height of a picture in pixels: 8 x 8 patches of 14, 16 image tokens after merging 2 x 2."""

_SCALE = 2  # Drawn at twice the size and averaged down, which smooths edges.
_CANVAS = SIDE * _SCALE

_BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {  # Upper and lower part.
    "kitchen": ((248, 226, 180), (214, 170, 120)),
    "garden": ((170, 215, 250), (130, 205, 105)),
    "dock": ((205, 235, 245), (75, 150, 205)),
    "street": ((200, 200, 205), (120, 120, 125)),
    "yard": ((250, 240, 215), (225, 190, 110)),
    "hall": ((225, 190, 235), (165, 110, 175)),
}

# Line around shapes (width in canvas pixels), lightness of the background, turn of the object's hue.
_STYLES = ((2, 1.0, 0), (0, 1.0, 0), (2, 1.12, 1), (3, 0.8, 0), (5, 0.95, 0), (0, 0.88, 1))


def draw(picture: Picture) -> PIL.Image.Image:
    """The picture as an RGB image of `SIDE` x `SIDE` pixels; the same pixels for the same `picture`."""
    stream = random.Random(picture.key)
    line, light, turn = _STYLES[picture.style]
    image = PIL.Image.new("RGB", (_CANVAS, _CANVAS))
    canvas = ImageDraw.Draw(image, "RGBA")
    _draw_place(canvas, picture.place, light, stream)
    for _ in range(picture.distractors):
        _draw_distractor(canvas, stream)
    column, row, mirror = picture.layout % 3, picture.layout // 3 % 3, picture.layout >= 9
    x, y = (SIDE * (0.5 + 0.12 * (cell - 1)) + stream.uniform(-3, 3) for cell in (column, row))
    if picture.second is not None:
        glyph, _ = GLYPHS[picture.second]
        corner = (stream.choice((14, SIDE - 14)) * _SCALE, stream.choice((14, SIDE - 14)) * _SCALE)
        glyph(Pen(canvas, corner, 12 * _SCALE), (165, 165, 165), None, 1.0)
    outline = ((25, 25, 25), line) if line else None
    size = SIDE * stream.uniform(0.3, 0.37)
    pen = Pen(canvas, (x * _SCALE, y * _SCALE), size * _SCALE, mirror=mirror, outline=outline)
    glyph, colour = GLYPHS[picture.state.object]
    glyph(pen, _varied(colour, stream, turn), picture.state.name, picture.clarity)
    return image.reduce(_SCALE)


def _varied(colour: Colour, stream: random.Random, turn: int = 0) -> Colour:
    """`colour` a little lighter or darker per channel, its channels rotated by `turn`."""
    rotated = colour[turn:] + colour[:turn]
    return tuple(min(255, max(0, value + stream.randint(-22, 22))) for value in rotated)  # type: ignore[return-value]


def _draw_place(canvas: ImageDraw.ImageDraw, place: str, light: float, stream: random.Random) -> None:
    upper, lower = (
        tuple(min(255, round(value * light)) for value in _varied(colour, stream)) for colour in _BACKGROUNDS[place]
    )
    horizon = round(_CANVAS * stream.uniform(0.5, 0.65))
    canvas.rectangle((0, 0, _CANVAS, horizon), fill=upper)
    canvas.rectangle((0, horizon, _CANVAS, _CANVAS), fill=lower)
    faint = (*BLACK, 60)
    offset = stream.randrange(24)
    if place == "kitchen":
        for at in range(offset, _CANVAS, 28):
            canvas.line((at, 0, at, horizon), fill=faint, width=2)
            canvas.line((0, at, _CANVAS, at), fill=faint, width=2)
    elif place == "garden":
        for at in range(offset, _CANVAS, 22):
            canvas.polygon(
                [(at, horizon + 30), (at + 6, horizon + 8), (at + 12, horizon + 30)], fill=(40, 120, 40, 200)
            )
    elif place == "dock":
        for at in range(horizon + 8, _CANVAS, 18):
            canvas.line((0, at, _CANVAS, at), fill=(*WHITE, 150), width=4)
    elif place == "street":
        for at in range(offset, _CANVAS, 40):
            canvas.rectangle((at, _CANVAS - 30, at + 22, _CANVAS - 22), fill=(*WHITE, 230))
    elif place == "yard":
        for at in range(offset, _CANVAS, 24):
            canvas.rectangle((at, horizon - 40, at + 9, horizon), fill=(150, 100, 50, 220))
    else:
        for at in range(offset, _CANVAS, 30):
            canvas.rectangle((at, 0, at + 12, horizon), fill=(120, 60, 140, 90))


def _draw_distractor(canvas: ImageDraw.ImageDraw, stream: random.Random) -> None:
    """A small shape anywhere, which the object may cover."""
    x, y, half = stream.randrange(_CANVAS), stream.randrange(_CANVAS), stream.randint(8, 15)
    colour = tuple(stream.randrange(40, 230) for _ in range(3))
    box = (x - half, y - half, x + half, y + half)
    shape = stream.randrange(3)
    if shape == 0:
        canvas.ellipse(box, fill=colour)
    elif shape == 1:
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x - half, y + half), (x, y - half), (x + half, y + half)], fill=colour)
