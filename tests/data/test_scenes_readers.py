"""Readers of one modality stay at chance on every split; the same readers given both find the rule."""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np
import pytest
from scipy import fft, ndimage

from srpo_jax.data import scenes
from srpo_jax.data.records import Record
from srpo_jax.data.world import language, rule

EVALUATION = tuple(split for split in scenes.SPLITS if split != "train")


@functools.cache
def records(split: str) -> tuple[Record, ...]:
    return tuple(scenes.records(split, 1920 if split == "train" else None))


def accuracy_interval(hits: np.ndarray) -> tuple[float, float, float]:
    """Share of hits and its 95 % Wilson interval."""
    n, p, z = len(hits), float(hits.mean()), 1.96
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    half *= np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, centre - half, centre + half


def assert_at_chance(hits: np.ndarray) -> None:
    rate, low, high = accuracy_interval(hits)
    assert 0.45 <= rate <= 0.55
    assert low <= 0.5 <= high


class FactorReader:
    """risk(picture, request) = <picture's vector, request's vector>, fitted by alternating ridge regression.

    Three numbers stand for a picture state and for a request. Shown one modality, every value of the other is the
    same "?"; it is the same reader in every other respect.
    """

    RANK, ROUNDS, RIDGE = 3, 50, 0.2

    def __init__(self, pictures: bool, requests: bool) -> None:
        self._pictures, self._requests = pictures, requests

    def _tokens(self, rows) -> tuple[list, list]:
        left = [(r.meta["object"], r.meta["state"]) if self._pictures else "?" for r in rows]
        right = [r.meta["kind"] if self._requests else "?" for r in rows]
        return left, right

    def fit(self, rows) -> FactorReader:
        left, right = self._tokens(rows)
        self._left, self._right = ({t: i for i, t in enumerate(sorted(set(side), key=str))} for side in (left, right))
        a, b = np.asarray([self._left[t] for t in left]), np.asarray([self._right[t] for t in right])
        y = np.asarray([1.0 if r.risky else -1.0 for r in rows])
        draw = np.random.default_rng(0)
        self._u, self._v = (draw.normal(size=(len(side), self.RANK)) for side in (self._left, self._right))
        for _ in range(self.ROUNDS):
            for own, other, i, j in ((self._u, self._v, a, b), (self._v, self._u, b, a)):
                for token in range(len(own)):
                    x = other[j[i == token]]
                    own[token] = np.linalg.solve(x.T @ x + self.RIDGE * np.eye(self.RANK), x.T @ y[i == token])
        return self

    def hits(self, rows) -> np.ndarray:
        left, right = self._tokens(rows)
        u, v = self._u[[self._left[t] for t in left]], self._v[[self._right[t] for t in right]]
        return ((u * v).sum(1) > 0) == np.asarray([r.risky for r in rows])


class KernelReader:
    """Ridge regression with a quadratic kernel on raw features: the question's pieces, the pixels, or both."""

    def __init__(self, features) -> None:
        self._features = features

    def _kernel(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return (1 + x @ z.T) ** 2

    def fit(self, rows) -> KernelReader:
        self._x = self._features(rows)
        y = np.asarray([1.0 if r.risky else -1.0 for r in rows])
        kernel = self._kernel(self._x, self._x)
        self._weights = np.linalg.solve(kernel + 1e-2 * np.trace(kernel) / len(rows) * np.eye(len(rows)), y)
        return self

    def hits(self, rows) -> np.ndarray:
        return (self._kernel(self._features(rows), self._x) @ self._weights > 0) == np.asarray([r.risky for r in rows])


class PictureReader:
    """Reads object and state from pixels alone: those of the training picture whose edges match best, shifted at will."""

    SIZE, PADDED = 56, 72

    def _edges(self, record: Record) -> np.ndarray:
        pixels = np.asarray(record.images[0].resize((self.SIZE, self.SIZE)), np.float32)
        edges = np.sqrt(sum(ndimage.gaussian_gradient_magnitude(pixels[..., c], 0.7) for c in range(3)))
        edges -= ndimage.uniform_filter(edges, 15)
        return fft.rfft2(edges / np.linalg.norm(edges), (self.PADDED, self.PADDED))

    def fit(self, rows) -> PictureReader:
        self._known = np.conj(np.stack([self._edges(r) for r in rows]))
        self._facts = [{key: r.meta[key] for key in ("object", "state")} for r in rows]
        return self

    def read(self, record: Record) -> dict[str, str]:
        match = fft.irfft2(self._known * self._edges(record), (self.PADDED, self.PADDED)).max((1, 2))
        return self._facts[int(match.argmax())]


def sensed(record: Record, reader: PictureReader) -> Record:
    """The record with nothing in `meta` but what its pixels and the words of its question tell."""
    (verb,) = question_words(record) & set(rule.KINDS)
    return dataclasses.replace(record, meta={**reader.read(record), "kind": verb})


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@functools.cache
def _index(tokens) -> dict[str, tuple[int, float]]:
    """token -> (its column, the log of one over its share of training records)."""
    counts = collections.Counter(token for r in records("train") for token in tokens(r))
    everything = {token for split in scenes.SPLITS for r in records(split) for token in tokens(r)}
    total = len(records("train"))
    return {t: (i, float(np.log(total / max(counts[t], 1)))) for i, t in enumerate(sorted(everything))}


def _weighed(rows, tokens) -> np.ndarray:
    """Bags of tokens, rare ones weighing more."""
    index = _index(tokens)
    x = np.zeros((len(rows), len(index)))
    for row, record in zip(x, rows, strict=True):
        for column, weight in (index[token] for token in tokens(record)):
            row[column] = weight
    return _unit(x)


def question_words(record: Record) -> frozenset[str]:
    return frozenset(piece.strip().lower() for piece in language.pieces(record.question))


def picture_facts(record: Record) -> frozenset[str]:
    """A perfect reading of the picture."""
    return frozenset(f"{key}={record.meta[key]}" for key in ("object", "state", "place", "layout", "style"))


def words(rows) -> np.ndarray:
    return _weighed(rows, question_words)


def symbols(rows) -> np.ndarray:
    return _weighed(rows, picture_facts)


def pixels(rows) -> np.ndarray:
    x = np.stack([np.asarray(r.images[0].resize((16, 16)), np.float64).ravel() for r in rows])
    return _unit(x - x.mean(1, keepdims=True))


@pytest.mark.parametrize("features", [words, pixels, symbols], ids=["words", "pixels", "symbols"])
def test_a_reader_of_raw_features_of_one_modality_is_at_chance(features):
    reader = KernelReader(features).fit(records("train"))
    for split in EVALUATION:
        assert_at_chance(reader.hits(records(split)))


@pytest.mark.parametrize(("pictures", "requests"), [(True, False), (False, True)], ids=["picture", "request"])
def test_a_factor_reader_of_one_modality_is_at_chance(pictures, requests):
    reader = FactorReader(pictures, requests).fit(records("train"))
    for split in EVALUATION:
        assert_at_chance(reader.hits(records(split)))


def test_positive_control_the_factor_reader_of_both_finds_the_rule_even_in_unseen_combinations():
    reader = FactorReader(True, True).fit(records("train"))
    for split in EVALUATION:
        assert reader.hits(records(split)).mean() > 0.95, split


def test_positive_control_the_kernel_reader_of_both_is_far_above_chance_where_combinations_were_seen():
    reader = KernelReader(lambda rows: np.concatenate([symbols(rows), words(rows)], 1)).fit(records("train"))
    for split in ("validation", "test_id", "wording", "rendering"):
        assert reader.hits(records(split)).mean() > 0.88, split


def test_positive_control_a_reader_of_pixels_and_words_finds_the_rule_and_of_pixels_alone_does_not():
    """The pixels hold the state, clearly enough for a reader that never sees `meta`; the risk needs the words, too."""
    reader = PictureReader().fit(records("train")[::2])  # twins share a picture
    clear = [r for r in records("validation") if not r.meta["hard"]][:240]
    rows = [sensed(r, reader) for r in clear]
    states = [r.meta["state"] == true.meta["state"] for r, true in zip(rows, clear, strict=True)]
    assert np.mean(states) > 0.95
    assert FactorReader(True, True).fit(records("train")).hits(rows).mean() > 0.95
    assert_at_chance(FactorReader(True, False).fit(records("train")).hits(rows))
    assert_at_chance(FactorReader(False, True).fit(records("train")).hits(rows))
