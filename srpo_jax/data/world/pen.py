"""A pen that draws an object into a box of the picture, whatever the box's place, size, tilt and handedness."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

BLACK, WHITE, GREY = (20, 20, 20), (250, 250, 250), (150, 150, 155)
RED, ORANGE, YELLOW = (225, 35, 30), (255, 130, 15), (255, 225, 40)
GREEN, BLUE, BROWN = (60, 190, 60), (40, 90, 220), (130, 75, 35)


class Pen:
    """Draws in box coordinates: x to the right and y down, both from -1 to 1.

    Args:
      draw: a drawing in mode "RGBA" over an RGB image, so that colours with an alpha below 255 blend.
      centre: pixel of the box's middle.
      size: half the side of the box in pixels.
      mirror: whether left and right change places.
      outline: colour and width in pixels of the line around shapes; None for no line.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        centre: Point,
        size: float,
        *,
        mirror: bool = False,
        outline: tuple[Colour, int] | None = None,
    ) -> None:
        self._draw, self._centre, self._size, self._mirror, self._outline = draw, centre, size, mirror, outline
        self._tilt, self._pivot = 0.0, (0.0, 0.0)

    def tilt(self, degrees: float, pivot: Point = (0.0, 0.0)) -> None:
        """Turns what follows clockwise by `degrees` around `pivot`."""
        self._tilt, self._pivot = math.radians(degrees), pivot

    def _pixel(self, point: Point) -> Point:
        x, y = point[0] - self._pivot[0], point[1] - self._pivot[1]
        cos, sin = math.cos(self._tilt), math.sin(self._tilt)
        x, y = x * cos - y * sin + self._pivot[0], x * sin + y * cos + self._pivot[1]
        return self._centre[0] + (-x if self._mirror else x) * self._size, self._centre[1] + y * self._size

    def polygon(self, points: Sequence[Point], colour: Colour, alpha: float = 1.0) -> None:
        """A filled shape; `alpha` is its contrast to what lies below."""
        pixels = [self._pixel(point) for point in points]
        opacity = round(255 * alpha)
        self._draw.polygon(pixels, fill=(*colour, opacity))
        if self._outline is not None:
            line, width = self._outline
            self._draw.line([*pixels, pixels[0], pixels[1]], fill=(*line, opacity), width=width)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour, alpha: float = 1.0) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, alpha)

    def disc(self, x: float, y: float, radius: float, colour: Colour, alpha: float = 1.0, squash: float = 1.0) -> None:
        """An ellipse of half-axes `radius` and `radius * squash`."""
        turns = [2 * math.pi * k / 20 for k in range(20)]
        self.polygon([(x + radius * math.cos(t), y + radius * squash * math.sin(t)) for t in turns], colour, alpha)

    def line(self, points: Sequence[Point], colour: Colour, width: float, alpha: float = 1.0) -> None:
        """A line of `width` in box units."""
        pixels = [self._pixel(point) for point in points]
        thick = max(1, round(width * self._size))
        self._draw.line(pixels, fill=(*colour, round(255 * alpha)), width=thick, joint="curve")

    def flame(self, x: float, y: float, height: float, alpha: float) -> None:
        """A flame standing on (x, y)."""
        for scale, colour in ((1.0, RED), (0.7, ORANGE), (0.4, YELLOW)):
            tall, half = height * scale, 0.32 * height * scale
            tips = [(-half, 0), (-half, -0.4 * tall), (-0.4 * half, -0.65 * tall), (0, -tall), (half, -0.45 * tall)]
            self.polygon([(x + dx, y + dy) for dx, dy in [*tips, (0.9 * half, 0)]], colour, alpha)

    def cloud(self, x: float, y: float, size: float, colour: Colour, alpha: float) -> None:
        """A cloud around (x, y)."""
        for dx, dy, radius in ((-0.6, 0.1, 0.45), (0.6, 0.1, 0.45), (0.0, -0.25, 0.55), (0.0, 0.2, 0.5)):
            self.disc(x + dx * size, y + dy * size, radius * size, colour, alpha)
