"""Where pixels and tokens lie: everything about Qwen2.5-VL's shapes that depends on the data, in numpy on the host.

An image is resized to a whole number of merge units (squares of merge x merge patches, one language token each). Its
patches come from the image processor unit by unit, units in raster order. For the vision tower they are laid out window
by window, and every window is padded to its full number of units, so that window attention is a reshape:

    units of a 3 x 3 image        windows of 2 x 2 units          layout (. = padding)
        0 1 2                        0 1 | 2 .
        3 4 5                        3 4 | 5 .                    0 1 3 4 | 2 . 5 . | 6 7 . . | 8 . . .
        6 7 8                        ----+----
                                     6 7 | 8 .
                                     . . | . .

Sources: the Qwen2-VL report (2409.12191; M-RoPE, dynamic resolution) and the Qwen2.5-VL report (2502.13923; window
attention). The rules agree with the released implementation, which the tests check live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from srpo_jax.inputs import VisionInputs
from srpo_jax.models.config import ModelConfig, VisionConfig

MAX_ASPECT_RATIO = 200
Size = tuple[int, int]  # (height, width)


def resized_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size to which an image is resized: multiples of `factor`, area within the pixel bounds, ratio nearly kept.

    Args:
      height: pixels.
      width: pixels.
      factor: side of a merge unit in pixels (patch size times merge size).
      min_pixels: smaller images are enlarged to at least this area.
      max_pixels: larger images are shrunk to at most this area.

    Returns:
      (height, width) in pixels. A side is never below `factor`, even where that breaks `max_pixels`.

    Raises:
      ValueError: an empty image, or one side more than 200 times the other.
    """
    if min(height, width) < 1:
        raise ValueError(f"image of {width}x{height} pixels is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"image of {width}x{height} pixels: one side is over {MAX_ASPECT_RATIO} times the other; crop it"
        )

    # round() halves to even, as the released rule does.
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def fit_images(
    sizes: Sequence[Size], factor: int, min_pixels: int, max_pixels: int, max_image_tokens: int | None = None
) -> list[Size]:
    """The sizes to which the images of one prompt are resized, so that together they keep the token budget.

    Over budget, only the largest images shrink: every image may take up to a common cap, the largest one that fits.

    Args:
      sizes: (height, width) of each image in pixels.
      factor: see `resized_size`.
      min_pixels: see `resized_size`; the budget has precedence.
      max_pixels: see `resized_size`.
      max_image_tokens: tokens of all images together; None for no budget.

    Raises:
      ValueError: the budget cannot be kept, or an image that `resized_size` refuses.
    """
    fitted = [resized_size(*size, factor, min_pixels, max_pixels) for size in sizes]
    tokens = [height * width // factor**2 for height, width in fitted]
    if max_image_tokens is None or sum(tokens) <= max_image_tokens:
        return fitted
    cap = _common_cap(tokens, max_image_tokens)
    for i, size in enumerate(sizes):
        if tokens[i] > cap:
            area = max(cap, 1) * factor**2
            fitted[i] = resized_size(*size, factor, min(min_pixels, area), area)
    total = sum(height * width // factor**2 for height, width in fitted)
    if total > max_image_tokens:
        raise ValueError(
            f"{len(sizes)} image(s) need at least {total} tokens, more than max_image_tokens={max_image_tokens}; "
            "raise the budget, use fewer images or crop long narrow ones"
        )
    return fitted


def _common_cap(tokens: Sequence[int], budget: int) -> int:
    """The largest cap c with sum(min(tokens, c)) <= budget."""
    rest = budget
    ordered = sorted(tokens)
    for done, count in enumerate(ordered):
        share = rest // (len(ordered) - done)
        if count > share:
            return share
        rest -= count
    return max(ordered)


def window_units(rows: int, columns: int, side: int) -> np.ndarray:
    """Merge units of one image in window order, windows padded to their full size.

    Args:
      rows: height of the image in merge units.
      columns: width of the image in merge units.
      side: side of a window in merge units.

    Returns:
      int64[windows * side**2], raster index of the unit, -1 for padding. Every window holds at least one unit.
    """
    units = np.arange(rows * columns).reshape(rows, columns)
    units = np.pad(units, [(0, -rows % side), (0, -columns % side)], constant_values=-1)
    windows = units.reshape(units.shape[0] // side, side, units.shape[1] // side, side)
    return windows.transpose(0, 2, 1, 3).reshape(-1)


def patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """int32[rows * columns * merge**2, 2], (row, column) of each patch, unit by unit; the arguments in merge units."""
    row, column = np.divmod(np.arange(rows * columns)[:, None], columns)
    inner_row, inner_column = np.divmod(np.arange(merge**2)[None], merge)
    positions = np.stack([row * merge + inner_row, column * merge + inner_column], axis=-1)
    return positions.reshape(-1, 2).astype(np.int32)


def lay_out_images(
    patches: Sequence[np.ndarray], grids: Sequence[Size], config: VisionConfig
) -> tuple[VisionInputs, list[np.ndarray]]:
    """Brings the images of one example into window order.

    Args:
      patches: per image float[rows * columns * merge**2, patch_dim], unit by unit, units in raster order.
      grids: per image (rows, columns) in merge units.
      config: the vision tower's sizes.

    Returns:
      The images one after the other (see `VisionInputs`; no batch axis), and per image int32[rows * columns]: the
      index of each unit, in raster order, among all merged features.

    Raises:
      ValueError: an image whose patches do not fill its grid.
    """
    unit, parts, slots, offset = config.merge_unit, [], [], 0
    for number, (image, (rows, columns)) in enumerate(zip(patches, grids, strict=True), start=1):
        if image.shape != (rows * columns * unit, config.patch_dim):
            wanted = f"({rows * columns * unit}, {config.patch_dim})"
            raise ValueError(
                f"image {number}: patches have shape {image.shape}, a {rows}x{columns} grid needs {wanted}"
            )
        order = window_units(rows, columns, config.window_units)
        real = order >= 0
        slot = np.empty(rows * columns, np.int32)
        slot[order[real]] = offset + np.flatnonzero(real)
        slots.append(slot)
        offset += len(order)
        parts.append(_in_window_order(image, (rows, columns), order, number, config))
    return VisionInputs(*(np.concatenate(field) for field in zip(*parts, strict=True))), slots


def _in_window_order(
    image: np.ndarray, grid: Size, order: np.ndarray, number: int, config: VisionConfig
) -> VisionInputs:
    unit, real = config.merge_unit, order >= 0

    def arrange(values: np.ndarray) -> np.ndarray:
        by_unit = values.reshape(-1, unit, *values.shape[1:])
        out = np.zeros((len(order), *by_unit.shape[1:]), values.dtype)
        out[real] = by_unit[order[real]]
        return out.reshape(-1, *values.shape[1:])

    positions = patch_positions(*grid, config.spatial_merge_size)
    return VisionInputs(arrange(image), arrange(positions), np.repeat(np.where(real, number, 0), unit).astype(np.int32))


def empty_vision(config: VisionConfig) -> VisionInputs:
    """The images of an example that has none: no patches, of the right trailing sizes and types."""
    return VisionInputs(np.zeros((0, config.patch_dim), np.float32), np.zeros((0, 2), np.int32), np.zeros(0, np.int32))


def mrope_positions(tokens: np.ndarray, grids: Sequence[Size], config: ModelConfig) -> np.ndarray:
    """M-RoPE ids: text advances all three together; an image spans a box of them and advances by its longer side.

    Args:
      tokens: int[T], image tokens already repeated once per merged feature.
      grids: per image (rows, columns) in merge units, in order of appearance.
      config: gives the ids of the image and video tokens.

    Returns:
      int32[3, T].

    Raises:
      ValueError: a video token, or image tokens that do not match `grids`.
    """
    spans = image_spans(tokens, grids, config)
    positions = np.empty((3, len(tokens)), np.int32)
    done, position = 0, 0
    for start, (rows, columns) in zip(spans, grids, strict=True):
        positions[:, done:start] = position + np.arange(start - done)
        position += start - done
        done = start + rows * columns
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[:, start:done] = position + np.stack([np.zeros_like(row), row, column])
        position += max(rows, columns)
    positions[:, done:] = position + np.arange(len(tokens) - done)
    return positions


def image_slots(
    tokens: np.ndarray, grids: Sequence[Size], slots: Sequence[np.ndarray], config: ModelConfig
) -> np.ndarray:
    """int32[T]: for an image token the index of its merged feature (see `lay_out_images`), -1 for text.

    Raises:
      ValueError: as `mrope_positions`.
    """
    out = np.full(len(tokens), -1, np.int32)
    for start, slot in zip(image_spans(tokens, grids, config), slots, strict=True):
        out[start : start + len(slot)] = slot
    return out


def image_spans(tokens: np.ndarray, grids: Sequence[Size], config: ModelConfig) -> list[int]:
    """Index of the first token of each image.

    Raises:
      ValueError: a video token, or image tokens that do not match `grids`.
    """
    tokens = np.asarray(tokens)
    if np.any(tokens == config.video_token_id):
        raise ValueError("video input is not supported; pass still frames as images")
    where = np.flatnonzero(tokens == config.image_token_id)
    counts = [rows * columns for rows, columns in grids]
    if len(where) != sum(counts):
        raise ValueError(f"the text has {len(where)} image tokens, but its {len(grids)} image(s) need {sum(counts)}")
    spans, first = [], 0
    for number, count in enumerate(counts, start=1):
        start, end = int(where[first]), int(where[first + count - 1])
        if end - start != count - 1:
            raise ValueError(f"the tokens of image {number} are interrupted by text")
        spans.append(start)
        first += count
    return spans
