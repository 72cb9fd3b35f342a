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


class PackedInputs(NamedTuple):
    """Several sequences end to end in one buffer of `F` tokens, their images in one of `N` patches: no padding in between.

    What works token by token runs over the buffer; attention runs over rows, one sequence (or one example's images) each,
    gathered from it. So a sequence's numbers do not depend on where in the buffer it stands.

    Attributes:
      tokens: int32[F].
      positions: int32[3, F].
      image_slots: int32[F], index of a token's feature among the merged features of all patches; -1 for text.
      rows: int32[n, T], where in the buffer token t of sequence i stands; 0 beyond its length.
      places: int32[F], its inverse: `i * T + t` of each token of the buffer.
      lengths: int32[n], tokens of each sequence, 0 for none.
      vision: patches float[1, N, patch_dim], positions int32[1, N, 2], images int32[1, N]; images are counted within their
        sequence.
      patch_rows: int32[n, P], where in the patch buffer the patches of sequence i stand; N, out of range, beyond them.
      patch_places: int32[N], its inverse.
    """

    tokens: Array
    positions: Array
    image_slots: Array
    rows: Array
    places: Array
    lengths: Array
    vision: VisionInputs | None = None
    patch_rows: Array | None = None
    patch_places: Array | None = None


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Static sizes of `PackedInputs`.

    Attributes:
      sequences: n.
      longest: T, room for the longest sequence.
      tokens: F, room for all of them.
      most_patches: P, room for the patches of one example; 0 for text alone.
      patches: N, room for those of all, whole windows.
      merge: patches behind one merged feature.

    Raises:
      ValueError: a buffer that cannot hold the largest example.
    """

    sequences: int
    longest: int
    tokens: int
    most_patches: int = 0
    patches: int = 0
    merge: int = 4

    def __post_init__(self) -> None:
        if self.tokens < self.longest or self.patches < self.most_patches:
            raise ValueError(f"{self}: the buffers must hold the longest sequence and the most patches of one")

    def holds(self, examples: Sequence[Encoded]) -> bool:
        """Whether the examples fit together."""
        patches = sum(e.patches for e in examples)
        return (
            len(examples) <= self.sequences
            and sum(len(e.tokens) for e in examples) <= self.tokens
            and patches <= self.patches
        )


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
    def patches(self) -> int:
        """Vision patches of all its images, whole windows."""
        return 0 if self.vision is None else len(self.vision.patches)

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


def pack_inputs(
    examples: Sequence[Encoded], shape: PrefillShape, empty_vision: VisionInputs | None = None
) -> PackedInputs:
    """Examples end to end in the buffers of `shape`, which must hold them (`shape.holds`).

    Args:
      examples: at most `shape.sequences`.
      shape: the sizes.
      empty_vision: `VisionInputs` of no patches, for their trailing sizes; needed if `shape.patches`.
    """
    lengths = [len(e.tokens) for e in examples]
    starts = np.cumsum([0, *lengths])
    tokens = np.zeros(shape.tokens, np.int32)
    positions, slots = np.zeros((3, shape.tokens), np.int32), np.full(shape.tokens, -1, np.int32)
    rows, places = np.zeros((shape.sequences, shape.longest), np.int32), np.zeros(shape.tokens, np.int32)
    patch_starts = np.cumsum([0, *(e.patches for e in examples)])
    for i, e in enumerate(examples):
        here = slice(starts[i], starts[i + 1])
        tokens[here], positions[:, here] = e.tokens, e.positions
        slots[here] = np.where(e.image_slots >= 0, e.image_slots + patch_starts[i] // shape.merge, -1)
        rows[i, : lengths[i]] = np.arange(here.start, here.stop)
        places[here] = i * shape.longest + np.arange(lengths[i])
    packed = PackedInputs(tokens, positions, slots, rows, places, pad_to(np.asarray(lengths, np.int32), len(rows), 0))
    if not shape.patches:
        return packed
    assert empty_vision is not None
    fields = (
        zip(*(e.vision for e in examples if e.vision is not None), strict=True) if patch_starts[-1] else empty_vision
    )
    joined = [np.concatenate(parts) if isinstance(parts, tuple) else parts for parts in fields]
    vision = VisionInputs(*(pad_to(field, shape.patches, 0)[None] for field in joined))
    patch_rows = np.full((shape.sequences, shape.most_patches), shape.patches, np.int32)
    patch_places = np.zeros(shape.patches, np.int32)
    for i, e in enumerate(examples):
        patch_rows[i, : e.patches] = np.arange(patch_starts[i], patch_starts[i + 1])
        patch_places[patch_starts[i] : patch_starts[i + 1]] = i * shape.most_patches + np.arange(e.patches)
    return packed._replace(vision=vision, patch_rows=patch_rows, patch_places=patch_places)
