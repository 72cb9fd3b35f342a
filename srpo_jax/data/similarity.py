"""Near-duplicates of pictures and texts, groups of what belongs together, and splits that keep groups whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import imagehash
import numpy as np
import PIL.Image
import rapidfuzz
import scipy.sparse
from rapidfuzz.utils import default_process

HASH_BITS = 256
"""Of a picture's hash. Copies in another size or compression differ in a few; strangers in about 128."""
BLOCK = 1024
"""Rows compared at a time: memory stays below BLOCK × n × 40 bytes."""


def image_hash(picture: PIL.Image.Image) -> np.ndarray:
    """uint8[32]: the perceptual hash of a picture, `HASH_BITS` bits (imagehash's pHash of 16 × 16)."""
    return np.packbits(imagehash.phash(picture, hash_size=16).hash.ravel())


def near_images(hashes: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Pairs i < j of pictures whose hashes differ in at most `distance` bits; every pair is compared.

    Args:
      hashes: uint8[n, 32], see `image_hash`.
      distance: 0 to `HASH_BITS`.
    """
    words = np.ascontiguousarray(hashes, np.uint8).reshape(len(hashes), HASH_BITS // 8).view(np.uint64)
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK, None]
        bits = sum(np.bitwise_count(block[..., w] ^ words[None, start:, w]).astype(np.int16) for w in range(4))
        yield from _above(start, bits <= distance)


def near_texts(texts: Sequence[str], similarity: float) -> Iterator[tuple[int, int]]:
    """Pairs i < j of texts alike to at least `similarity` (0 to 100, rapidfuzz's `ratio`), case and punctuation aside.

    Every pair is compared: work grows with n².
    """
    plain = [default_process(text) for text in texts]
    for start in range(0, len(plain), BLOCK):
        scores = rapidfuzz.process.cdist(
            plain[start : start + BLOCK], plain[start:], scorer=rapidfuzz.fuzz.ratio, score_cutoff=similarity
        )
        yield from _above(start, scores >= similarity)


def _above(start: int, near: np.ndarray) -> Iterator[tuple[int, int]]:
    for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        yield start + int(i), start + int(j)


def connected(n: int, links: Iterable[tuple[int, int]]) -> np.ndarray:
    """int64[n]: for each of n things the smallest index that it is linked to, directly or through others."""
    pairs = np.asarray(list(links), np.int64).reshape(-1, 2)
    graph = scipy.sparse.coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels].astype(np.int64)


def split_groups(groups: Sequence[str], shares: Mapping[str, float], seed: int = 0) -> list[str]:
    """The split of each thing; things of one group share it.

    Groups are taken in an order drawn from `seed` and their names, each into the split that lacks most of its share.

    Args:
      groups: the group's name for each thing.
      shares: split → its share of the things; they add up to 1.

    Raises:
      ValueError: shares that are negative or do not add up to 1.
    """
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)}: give one of 0 or more for each split, together 1")
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    filled, chosen = dict.fromkeys(shares, 0), {}
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        split = max(shares, key=lambda name: shares[name] * len(groups) - filled[name])
        chosen[group], filled[split] = split, filled[split] + sizes[group]
    return [chosen[group] for group in groups]
