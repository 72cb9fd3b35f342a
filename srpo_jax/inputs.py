"""What a multimodal model reads: one example on the host (`Encoded`), a padded batch on the device (`Inputs`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# jax.Array on the device, np.ndarray on the host. A union would ask for a cast at every crossing.
Array = Any


class VisionInputs(NamedTuple):
    """Patches of all images of each row, in window order, every window padded to its full number of patches.

    Attributes:
      patches: float[B, N, patch_dim], flattened pixels of a patch, zeros where padded.
      positions: int32[B, N, 2], (row, column) of the patch in its image's patch grid, for the 2-D rotary embedding.
      images: int32[B, N], the patch's image counted from 1 within the row; 0 marks padding.
    """

    patches: Array
    positions: Array
    images: Array


class Inputs(NamedTuple):
    """A batch of token sequences with their images.

    Attributes:
      tokens: int32[B, T], right-padded.
      positions: int32[B, 3, T], M-RoPE ids for time, height, width.
      image_slots: int32[B, T], index of the merged image feature that replaces the token's embedding; -1 for text.
      lengths: int32[B], number of valid tokens.
      vision: the rows' images, or None when no row has one.
    """

    tokens: Array
    positions: Array
    image_slots: Array
    lengths: Array
    vision: VisionInputs | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example on the host, unpadded.

    Attributes:
      tokens: int32[T].
      positions: int32[3, T].
      image_slots: int32[T], -1 for text.
      vision: `VisionInputs` without the batch axis, or None.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image_slots: np.ndarray
    vision: VisionInputs | None = None

    def append(self, tokens: Sequence[int] | np.ndarray) -> Encoded:
        """This example continued by text tokens, whose three position ids advance together by one."""
        tail = np.asarray(tokens, np.int32)
        start = self.next_position
        positions = np.broadcast_to(start + np.arange(len(tail), dtype=np.int32), (3, len(tail)))
        return Encoded(
            tokens=np.concatenate([self.tokens, tail]),
            positions=np.concatenate([self.positions, positions], axis=1),
            image_slots=np.concatenate([self.image_slots, np.full(len(tail), -1, np.int32)]),
            vision=self.vision,
        )

    def prefix(self, length: int) -> Encoded:
        """The first `length` tokens of this example, with all its images."""
        return Encoded(self.tokens[:length], self.positions[:, :length], self.image_slots[:length], self.vision)

    @property
    def next_position(self) -> int:
        """The position id of a text token that would follow."""
        return int(self.positions.max()) + 1 if self.positions.size else 0


def pad_to(array: np.ndarray, size: int, axis: int, value: float = 0) -> np.ndarray:
    """Pads `array` on the right of `axis` to `size` with `value`; ValueError if it is already longer."""
    missing = size - array.shape[axis]
    if missing < 0:
        raise ValueError(f"an axis of {array.shape[axis]} does not fit into {size}")
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return np.pad(array, widths, constant_values=value)


def batch_inputs(examples: Sequence[Encoded], length: int, patches: int | None = None) -> Inputs:
    """Stacks examples into `Inputs`, tokens padded to `length` and patches to `patches` (the largest if None).

    Rows without an image get all-padding vision when another row has one.
    """
    vision = batch_vision([e.vision for e in examples], patches)
    return Inputs(
        tokens=np.stack([pad_to(e.tokens, length, 0) for e in examples]),
        positions=np.stack([pad_to(e.positions, length, 1) for e in examples]),
        image_slots=np.stack([pad_to(e.image_slots, length, 0, -1) for e in examples]),
        lengths=np.asarray([len(e.tokens) for e in examples], np.int32),
        vision=vision,
    )


def batch_vision(images: Sequence[VisionInputs | None], patches: int | None = None) -> VisionInputs | None:
    """Stacks the images of examples, padded to `patches` (the largest if None); None if no example has any."""
    template = next((v for v in images if v is not None and len(v.patches)), None)
    if template is None:
        return None
    empty = VisionInputs(*(np.zeros((0, *a.shape[1:]), a.dtype) for a in template))
    rows = [empty if v is None else v for v in images]
    size = max(len(v.patches) for v in rows) if patches is None else patches
    return VisionInputs(*(np.stack([pad_to(a, size, 0) for a in field]) for field in zip(*rows, strict=True)))
