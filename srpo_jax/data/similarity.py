"""Near-duplicates of pictures and texts, groups of what belongs together, and splits that keep groups whole.

Both searches are exact: they find what a comparison of all pairs finds. Something is looked up, not compared, because few
differences cannot touch all parts of a thing: of two hashes of which d bits differ, cut into m blocks, some block differs in
at most d/m bits (multi-index hashing, Norouzi et al. 2012); of k insertions and deletions that turn one text into another,
cut into k+1 segments, some segment is untouched (Pass-Join, Li et al. 2011). Where looking up would cost more than comparing
(few things, wide distances), things are compared.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import imagehash
import numpy as np
import PIL.Image
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

HASH_BITS = 256
"""Of a picture's hash. Copies in another size or compression differ in a few; strangers in about 128."""
CHUNK = 65_536
"""Hashes that are unpacked at a time."""
BATCH = 1024
"""Texts that are compared at a time: who wants one that is alike does not wait for all."""


def image_hash(picture: PIL.Image.Image) -> np.ndarray:
    """uint8[32]: the perceptual hash of a picture, `HASH_BITS` bits (imagehash's pHash of 16 × 16)."""
    return np.packbits(imagehash.phash(picture, hash_size=16).hash.ravel())


class ImageIndex:
    """Finds the hashes within some distance of a hash.

    Hashes are cut into blocks of about log2 n bits (block b of m: bits b, b+m, b+2m, ...), one table for each block. A query
    looks up all values of a block near enough to its own: d = m·r + a bits cannot leave each of the first a+1 blocks more than
    r bits apart and each of the others more than r−1. Where that means more look-ups or candidates than there are hashes, all
    of them are compared, in n · 4 operations on words.

    About 32 + 20 · HASH_BITS / log2 n bytes of memory per hash.

    Args:
      hashes: uint8[n, 32], see `image_hash`.
      distance: bits, 0 to `HASH_BITS`.

    Raises:
      ValueError: a distance out of range.
    """

    def __init__(self, hashes: np.ndarray, distance: int):
        if not 0 <= distance <= HASH_BITS:
            raise ValueError(f"distance={distance}: it must be 0 to {HASH_BITS} bits")
        hashes = np.ascontiguousarray(hashes, np.uint8).reshape(-1, HASH_BITS // 8)
        n = len(hashes)
        self._words, self._distance = hashes.view(np.uint64), distance
        width = max(8, n.bit_length())
        blocks = -(-HASH_BITS // width)
        radius, spare = divmod(distance, blocks)
        # (bits of the block, radius) of those blocks that are looked up
        looked = [(range(b, HASH_BITS, blocks), radius - (b > spare)) for b in range(blocks)]
        looked = [(bits, r) for bits, r in looked if r >= 0]
        probes = sum(math.comb(len(bits), i) for bits, r in looked for i in range(r + 1))
        self._compares = probes >= n
        if self._compares:
            return
        self._weights = np.zeros((HASH_BITS, len(looked)), np.float32)  # sums below 2**24 are exact
        for block, (bits, _) in enumerate(looked):
            self._weights[bits, block] = 1 << np.arange(len(bits))
        keys = np.concatenate([self._keys(hashes[i : i + CHUNK]) for i in range(0, n, CHUNK)])
        self._places = np.empty((len(looked), n), np.int32)
        starts: list[np.ndarray] = []
        offsets, masks = [], []
        for block, (bits, r) in enumerate(looked):
            self._places[block] = np.argsort(keys[:, block], kind="stable")
            offsets.append(sum(len(one) for one in starts))
            ends = np.cumsum(np.bincount(keys[:, block], minlength=1 << len(bits)))
            starts.append(block * n + np.concatenate([[0], ends]))
            every = np.arange(1 << len(bits))
            masks.append(every[np.bitwise_count(every) <= r])
        self._starts, self._flat = np.concatenate(starts), self._places.ravel()
        self._block = np.repeat(np.arange(len(looked)), [len(one) for one in masks])
        self._offset, self._mask = np.asarray(offsets)[self._block], np.concatenate(masks)

    def _keys(self, hashes: np.ndarray) -> np.ndarray:
        """int64[n, blocks]: the bits of each block as a number."""
        return (np.unpackbits(hashes, axis=1).astype(np.float32) @ self._weights).astype(np.int64)

    def near(self, hash: np.ndarray) -> np.ndarray:
        """int64[k]: the places of the hashes within the distance of `hash` (uint8[32]), in order."""
        hash = np.ascontiguousarray(hash, np.uint8)
        places = None if self._compares else self._candidates(hash)
        words = self._words if places is None else self._words[places]
        bits = np.bitwise_count(words ^ hash.view(np.uint64))
        near = np.flatnonzero(bits.sum(axis=1, dtype=np.int16) <= self._distance)
        return near if places is None else np.unique(places[near])

    def _candidates(self, hash: np.ndarray) -> np.ndarray | None:
        """Places that share enough with a hash, some more than once; None if there are more than hashes."""
        cells = self._offset + (self._keys(hash[None])[0][self._block] ^ self._mask)
        first = self._starts[cells]
        counts = self._starts[cells + 1] - first
        total = int(counts.sum())
        if total > len(self._words):
            return None
        before = np.cumsum(counts) - counts
        return self._flat[np.repeat(first - before, counts) + np.arange(total)]


def image_groups(hashes: np.ndarray, distance: int) -> np.ndarray:
    """int64[n]: for each picture the first that it is linked to, directly or through others.

    Linked are pictures whose hashes differ in at most `distance` bits. Equal hashes are looked up once, and those that have a
    group are no longer looked for, so that many pictures of one kind cost no more than others.

    Args:
      hashes: uint8[n, 32], see `image_hash`.
      distance: 0 to `HASH_BITS`.
    """
    hashes = np.ascontiguousarray(hashes, np.uint8).reshape(-1, HASH_BITS // 8)
    distinct, first, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    group = np.full(len(distinct), -1)
    left = np.argsort(first)  # places without a group when the index was made
    index, found = ImageIndex(distinct[left], distance), 0
    for start in left:
        waiting = [start] if group[start] < 0 else []
        group[waiting] = first[start]
        found += len(waiting)
        while waiting:
            near = left[index.near(distinct[waiting.pop()])]
            near = near[group[near] < 0]
            group[near] = first[start]
            found += len(near)
            waiting.extend(near)
            if found > len(left) // 2:
                left, found = left[group[left] < 0], 0
                index = ImageIndex(distinct[left], distance)
    return group[which.reshape(-1)]


class TextIndex:
    """Finds the texts that are alike to at least some similarity, case and punctuation aside.

    Similarity is rapidfuzz's `ratio`: 100 · (1 − k / (|a| + |b|)) with k the least number of characters to insert and delete.
    So k is bounded for a pair of lengths. A text is cut into more segments than that; the first segment up to which there are
    no more changes than segments before it is untouched and has as many changes before it as segments, which leaves few
    places where it can stand in the other text.

    Memory: a table entry per segment, of which a text of 60 characters has 14 at a similarity of 90.

    Args:
      texts: any.
      similarity: above 0, at most 100.

    Raises:
      ValueError: a similarity out of range.
    """

    def __init__(self, texts: Sequence[str], similarity: float):
        if not 0 < similarity <= 100:
            raise ValueError(f"similarity={similarity}: it must be above 0 and at most 100")
        self._texts = [default_process(text) for text in texts]
        self._similarity = similarity
        self._of_length: dict[int, list[int]] = {}
        for place, text in enumerate(self._texts):
            self._of_length.setdefault(len(text), []).append(place)
        self._cut: dict[int, tuple[list[int], list[dict[str, list[int]]]]] = {}

    def near(self, text: str) -> Iterator[int]:
        """Places of the texts like `text`, each once, as they are found."""
        return self._near(default_process(text))

    def near_own(self, place: int) -> Iterator[int]:
        """Places of the texts like the one at `place`, which is among them."""
        return self._near(self._texts[place])

    def _near(self, text: str) -> Iterator[int]:
        seen, waiting = set[int](), list[int]()
        for places in self._candidates(text):
            for start in range(0, len(places), BATCH):
                fresh = [place for place in places[start : start + BATCH] if place not in seen]
                seen.update(fresh)
                waiting += fresh
                if len(waiting) >= BATCH:
                    yield from self._alike(text, waiting)
                    waiting = []
        yield from self._alike(text, waiting)

    def _alike(self, text: str, places: list[int]) -> list[int]:
        texts = [self._texts[place] for place in places]
        scores = process.cdist([text], texts, scorer=fuzz.ratio, score_cutoff=self._similarity)
        return [places[number] for number in np.flatnonzero(scores).tolist()]

    def _candidates(self, text: str) -> Iterator[list[int]]:
        """All places where a text can stand that is like `text`, some more than once."""
        for length, places in self._of_length.items():
            changes = self._changes(length, len(text))
            if abs(length - len(text)) > changes:
                continue
            # At most (changes + 2)² / 4 look-ups, each as much work as about four comparisons; segments are not empty.
            if len(places) <= (changes + 2) ** 2 or changes >= length:
                yield places
            else:
                yield from self._sharing(text, length, changes)

    def _sharing(self, text: str, length: int, changes: int) -> Iterator[list[int]]:
        """Texts of a length that hold one of their segments where at most `changes` allow."""
        cuts, tables = self._segments(length)
        longer = len(text) - length
        for segment, table in enumerate(tables[: changes + 1]):
            start, stop, after = cuts[segment], cuts[segment + 1], changes - segment
            low = max(-segment, longer - after, -start)
            # So many insertions and deletions shift it by an even number if they are even in number, else by an odd one.
            low += (low - segment) % 2
            for shift in range(low, min(segment, longer + after, len(text) - stop) + 1, 2):
                found = table.get(text[start + shift : stop + shift])
                if found is not None:
                    yield found

    def _changes(self, a: int, b: int) -> int:
        """Most insertions and deletions between alike texts of these lengths."""
        return math.floor((1 - self._similarity / 100) * (a + b) + 1e-6)

    def _segments(self, length: int) -> tuple[list[int], list[dict[str, list[int]]]]:
        """Where texts of a length are cut, and for each segment the places of the texts by what stands there."""
        if length not in self._cut:
            longest = math.floor(length * (200 / self._similarity - 1) + 1e-6)  # text that can be alike
            segments = min(length, self._changes(length, longest) + 1)  # more than changes wherever they are used
            cuts = [i * length // segments for i in range(segments + 1)]
            tables: list[dict[str, list[int]]] = [{} for _ in range(segments)]
            for place in self._of_length[length]:
                text = self._texts[place]
                for table, start, stop in zip(tables, cuts, cuts[1:], strict=False):
                    table.setdefault(text[start:stop], []).append(place)
            self._cut[length] = cuts, tables
        return self._cut[length]


def repeated(
    near: Callable[[int], Iterable[int]],
    groups: Sequence[object],
    most: int | None = 1,
    given: int = 0,
) -> dict[int, int]:
    """The things that go if a repeat goes and the first stays: which of them → an earlier one, like it, that stays.

    Things are looked at in order. One goes if it is like `most` earlier ones that stay, or like one of these of its own group.
    Only those that stay are asked about, so that things that are all alike cost no more than others.

    Args:
      near: the things like a thing; itself may be among them.
      groups: of each thing.
      most: None for any number; then only likeness within a group counts.
      given: so many first things stay whatever they are like.
    """
    gone: dict[int, int] = {}
    like: dict[int, list[int]] = {}
    for one in range(len(groups)):
        if one in gone:
            continue
        for other in near(one):
            if other <= one or other < given or other in gone:
                continue
            earlier = like.setdefault(other, [])
            earlier.append(one)
            if groups[other] == groups[one]:
                gone[other] = one
            elif most is not None and len(earlier) >= most:
                gone[other] = earlier[0]
    return gone


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
