"""What a multimodal model reads: one example on the host (`Encoded`), a padded batch on the device (`Inputs`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MERGE = 4
"""Patches behind one merged feature, a language token: two by two neighbours."""

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


class PackedVision(NamedTuple):
    """Patches of the images of several examples end to end, in G buffers of N patches: no padding in between.

    Attributes:
      patches: float[G, N, patch_dim], see `VisionInputs`.
      positions: int32[G, N, 2].
      images: int32[G, N], counted from 1 within their example; 0 marks padding.
      rows: int32[G, n, P], where in the buffer the patches of example i stand; N, out of range, beyond them. Attention within
        whole images runs over these.
      places: int32[G, N], its inverse: `i * P + p` of each patch of the buffer.
    """

    patches: Array
    positions: Array
    images: Array
    rows: Array
    places: Array


class Features(NamedTuple):
    """What a vision tower makes of `PackedVision`, made before.

    Attributes:
      values: float[G, N / MERGE, D].
    """

    values: Array


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
      vision: the sequences' images in one buffer (G = 1), or None without room for any.
    """

    tokens: Array
    positions: Array
    image_slots: Array
    rows: Array
    places: Array
    lengths: Array
    vision: PackedVision | Features | None = None


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Static sizes of `PackedInputs`.

    Attributes:
      sequences: n.
      longest: T, room for the longest sequence.
      tokens: F, room for all of them.
      most_patches: P, room for the patches of one example; 0 for text alone.
      patches: N, room for those of all, whole windows.

    Raises:
      ValueError: a buffer that cannot hold the largest example.
    """

    sequences: int
    longest: int
    tokens: int
    most_patches: int = 0
    patches: int = 0

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
      features: float[patches / MERGE, D], what the vision tower makes of them, where that is known already: the model then
        reads these.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image_slots: np.ndarray
    vision: VisionInputs | None = None
    features: np.ndarray | None = None

    def append(self, tokens: Sequence[int] | np.ndarray) -> Encoded:
        """This example continued by text tokens, whose three position ids advance together by one."""
        tail = np.asarray(tokens, np.int32)
        start = self.next_position
        positions = np.broadcast_to(start + np.arange(len(tail), dtype=np.int32), (3, len(tail)))
        return dataclasses.replace(
            self,
            tokens=np.concatenate([self.tokens, tail]),
            positions=np.concatenate([self.positions, positions], axis=1),
            image_slots=np.concatenate([self.image_slots, np.full(len(tail), -1, np.int32)]),
        )

    def prefix(self, length: int) -> Encoded:
        """The first `length` tokens of this example, with all its images."""
        parts = self.tokens[:length], self.positions[:, :length], self.image_slots[:length]
        return Encoded(*parts, self.vision, self.features)

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
    examples: Sequence[Encoded], shape: PrefillShape, nothing: VisionInputs | Features | None = None
) -> PackedInputs:
    """Examples end to end in the buffers of `shape`, which must hold them (`shape.holds`).

    Args:
      examples: at most `shape.sequences`.
      shape: the sizes.
      nothing: see `pack_vision`; needed if `shape.patches`.
    """
    lengths = [len(e.tokens) for e in examples]
    starts = np.cumsum([0, *lengths])
    tokens = np.zeros(shape.tokens, np.int32)
    positions, slots = np.zeros((3, shape.tokens), np.int32), np.full(shape.tokens, -1, np.int32)
    rows, places = np.zeros((shape.sequences, shape.longest), np.int32), np.zeros(shape.tokens, np.int32)
    for i, (e, offset) in enumerate(zip(examples, feature_offsets(examples), strict=True)):
        here = slice(starts[i], starts[i + 1])
        tokens[here], positions[:, here] = e.tokens, e.positions
        slots[here] = np.where(e.image_slots >= 0, e.image_slots + offset, -1)
        rows[i, : lengths[i]] = np.arange(here.start, here.stop)
        places[here] = i * shape.longest + np.arange(lengths[i])
    packed = PackedInputs(tokens, positions, slots, rows, places, pad_to(np.asarray(lengths, np.int32), len(rows), 0))
    if not shape.patches:
        return packed
    assert nothing is not None
    return packed._replace(vision=pack_vision([examples], shape.sequences, shape.patches, shape.most_patches, nothing))


def feature_offsets(examples: Sequence[Encoded]) -> list[int]:
    """Where the features of each example begin when the examples' patches stand end to end."""
    return [int(n) // MERGE for n in np.cumsum([0, *(e.patches for e in examples)])[:-1]]


def pack_vision(
    groups: Sequence[Sequence[Encoded]], size: int, patches: int, most: int, nothing: VisionInputs | Features
) -> PackedVision | Features:
    """The images of groups of examples, end to end in a buffer for each group; or their features, if `nothing` is such.

    Args:
      groups: one for each buffer.
      size: n, room for examples in a group.
      patches: N, a buffer's room for patches, whole windows.
      most: P, room for the patches of one example.
      nothing: no patches, or no features: for their trailing sizes and dtype.

    Raises:
      ValueError: an example with images whose features are needed and missing.
    """
    buffers = [_fill_vision(group, size, patches, most, nothing) for group in groups]
    return type(buffers[0])(*(np.stack(field) for field in zip(*buffers, strict=True)))


def _fill_vision(
    group: Sequence[Encoded], size: int, patches: int, most: int, nothing: VisionInputs | Features
) -> PackedVision | Features:
    if isinstance(nothing, Features):
        known = [e.features for e in group if e.features is not None]
        if len(known) < sum(e.vision is not None for e in group):
            raise ValueError("features of some images are known and of others not: encode all of them, or none")
        return Features(pad_to(np.concatenate([nothing.values, *known]), patches // MERGE, 0))
    drawn = [e.vision for e in group if e.vision is not None]
    joined = [np.concatenate([empty, *(vision[i] for vision in drawn)]) for i, empty in enumerate(nothing)]
    rows, places = np.full((size, most), patches, np.int32), np.zeros(patches, np.int32)
    for i, (e, offset) in enumerate(zip(group, feature_offsets(group), strict=True)):
        here = np.arange(e.patches)
        rows[i, : e.patches] = MERGE * offset + here
        places[MERGE * offset + here] = i * most + here
    pixels, positions, images = (pad_to(field, patches, 0) for field in joined)
    return PackedVision(pixels, positions, images, rows, places)


def nothing_of(examples: Sequence[Encoded]) -> VisionInputs | Features | None:
    """The first argument of its kind for `pack_vision`: none of the examples' features or else patches; None without images."""
    first = next((e for e in examples if e.vision is not None), None)
    if first is None or first.vision is None:
        return None
    if first.features is not None:
        return Features(first.features[:0])
    return VisionInputs(*(field[:0] for field in first.vision))
