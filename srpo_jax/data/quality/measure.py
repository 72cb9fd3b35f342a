"""The numbers of a data set's quality report."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from srpo_jax.data.images import ImageError, open_image
from srpo_jax.data.quality import leakage
from srpo_jax.data.records import Record
from srpo_jax.data.similarity import ImageIndex, TextIndex, image_hash
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor
from srpo_jax.paths import STEP_TITLES, Grammar

IMAGE_DISTANCE = 16
"""Bits of 256 by which the hashes of near-duplicate pictures differ at most."""
TEXT_SIMILARITY = 90.0
"""Of near-duplicate questions, of 100."""
SHOWN = 20
"""How many examples of a fault are listed."""
PERCENTILES = (0, 5, 50, 95, 100)


def measure(
    records: Sequence[Record],
    *,
    processor: Processor | None = None,
    policy: Policy | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Measures a data set. Every picture is opened once.

    Args:
      records: at least one.
      processor: counts tokens as this model sees them; None counts none.
      policy: its vision tower reads the pictures for the leak, beside their pixels; None leaves that out.
      seed: of the readers.
      progress: wraps the numbers of the records while their pictures are read.

    Returns:
      JSON values: "records", "counts" (by split, category, review, licence, finding), "lengths" (words), "pictures"
      ("unreadable" lists id and fault), "leakage" (see `leakage.leak`), "duplicates", and "tokens" if there is a processor.
    """
    pictures = _Pictures(records, processor, policy, progress)
    readable = sorted(pictures.features)
    risky, clusters = [r.risky for r in records], [r.cluster for r in records]
    readers: dict[str, tuple[Callable[[int], Any], Any, Sequence[int]]] = {
        "question": (leakage.text_reader, [r.question for r in records], range(len(records)))
    }
    if readable:
        seen = np.stack([pictures.features[i] for i in readable])
        readers["picture"] = (leakage.pixel_reader, seen, readable)
    if readable and policy is not None:
        readers["picture (vision tower)"] = (leakage.tower_reader, np.stack(pictures.towers), readable)
    leaks = {}
    for name, (reader, inputs, places) in readers.items():
        found = leakage.leak(reader, inputs, [risky[i] for i in places], [clusters[i] for i in places], seed=seed)
        leaks[name] = found | {"told": [records[places[i]].id for i in found.get("told", [])]}
    measured = {
        "records": len(records),
        "counts": _counts(records),
        "lengths": _lengths(records),
        "pictures": {"files": pictures.count, "unreadable": pictures.faults, "sizes": _spread(pictures.sizes)},
        "leakage": leaks,
        "duplicates": _duplicates(records, pictures),
    }
    return measured | ({} if processor is None else {"tokens": pictures.tokens.told()})


class _Pictures:
    """One pass over the pictures: their faults, hashes, features and tokens. No more than a batch of them is held.

    Attributes:
      features: place of a record → float32[506], the mean over its pictures; records without a readable one are absent.
      towers: what the vision tower makes of the records with features, in order.
      hashes: uint8[32] of each readable picture, with the place of its record in `owners`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor | None,
        policy: Policy | None,
        progress: Callable[[Iterable[int]], Iterable[int]],
    ):
        self.count = 0
        self.faults: list[dict[str, str]] = []
        self.sizes: list[int] = []
        self.features: dict[int, np.ndarray] = {}
        self.hashes: list[np.ndarray] = []
        self.owners: list[int] = []
        self.towers: list[np.ndarray] = []
        self.tokens = _Tokens(processor)
        waiting: list[list[PIL.Image.Image]] = []
        for index in progress(range(len(records))):
            opened = self._open(records[index], index)
            if opened:
                self.features[index] = np.mean([leakage.pixel_features(p) for p in opened], axis=0)
            if len(opened) == len(records[index].images):
                self.tokens.add(records[index], opened)
            waiting += [opened] if opened and policy is not None else []
            if policy is not None and waiting and (len(waiting) == 8 or index == len(records) - 1):
                self.towers += [*leakage.tower_features(policy, waiting)]
                waiting = []

    def _open(self, record: Record, index: int) -> list[PIL.Image.Image]:
        opened = []
        for image in record.images:
            self.count += 1
            try:
                picture = open_image(image)
            except ImageError as error:
                self.faults.append({"id": record.id, "fault": str(error)})
                continue
            opened.append(picture)
            self.sizes.append(picture.width * picture.height)
            self.hashes.append(image_hash(picture))
            self.owners.append(index)
        return opened


class _Tokens:
    """Tokens of prompts, paths and replies, as a processor makes them."""

    def __init__(self, processor: Processor | None):
        self._processor, self._grammar = processor, Grammar()
        self._counts: dict[str, list[int]] = {"prompt": [], "path": [], "reply": [], "all": []}
        self._refused: list[dict[str, str]] = []

    def add(self, record: Record, pictures: list[PIL.Image.Image]) -> None:
        """Counts one record."""
        if self._processor is None:
            return
        *steps, reply = self._grammar.render(record.steps, record.safe_reply)
        try:
            prompt = len(self._processor.encode(pictures, record.question).tokens)
            path = sum(len(self._processor.tokenize(step)) for step in steps)
            answer = len(self._processor.tokenize(reply)) + 1  # the end of the turn
        except ValueError as error:
            self._refused.append({"id": record.id, "fault": str(error)})
            return
        counts = {"prompt": prompt, "path": path, "reply": answer, "all": prompt + path + answer}
        for name, count in counts.items():
            self._counts[name].append(count)

    def told(self) -> dict[str, Any]:
        """The report's part."""
        assert self._processor is not None
        context = self._processor.config.text.max_position_embeddings
        beyond = sum(count > context for count in self._counts["all"])
        spreads = {name: _spread(counts) for name, counts in self._counts.items()}
        return {"context": context, "beyond_context": beyond, "refused": self._refused, **spreads}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    splits = sorted({_split(record) for record in records})
    table = collections.Counter((record.category or "harmless", _split(record)) for record in records)
    names = sorted({name for name, _ in table}, key=lambda name: (name == "harmless", name))
    found: collections.Counter[str] = collections.Counter()
    for record in records:
        listed = record.meta.get("findings")
        for one in listed if isinstance(listed, list) else []:
            found[f"{one.get('check', '?')}, {one.get('level', '?')}" if isinstance(one, Mapping) else "?"] += 1
    told = [_mapping(record.meta.get("provenance")) for record in records]
    return {
        "splits": splits,
        "by_category": {name: {split: table[name, split] for split in splits} for name in names},
        "risky": sum(record.risky for record in records),
        "without_twin": sum(record.twin is None for record in records),
        "without_unsafe_reply": sum(record.risky and record.unsafe_reply is None for record in records),
        "without_picture": sum(not record.images for record in records),
        "synthetic": sum(one.get("synthetic") is True for one in told),
        "review": _tally(_mapping(record.meta.get("review")).get("status", "not reviewed") for record in records),
        "licence": _tally(_mapping(one.get("image")).get("licence", "not told") for one in told),
        "findings": dict(found.most_common()),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _tally(values: Iterable[Any]) -> dict[str, int]:
    return dict(collections.Counter(str(value) for value in values).most_common())


def _split(record: Record) -> str:
    return str(record.meta.get("split", "not told"))


def _lengths(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Words; of steps one by one."""
    texts = {f"step {n}: {title}": [r.steps[n - 1] for r in records] for n, title in enumerate(STEP_TITLES, 1)}
    replies = {"safe reply": [r.safe_reply for r in records]}
    replies["unsafe reply"] = [r.unsafe_reply for r in records if r.unsafe_reply is not None]
    texts = {"question": [r.question for r in records], **texts, **replies}
    return {name: _spread([len(text.split()) for text in told]) for name, told in texts.items() if told}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; {} of nothing."""
    if not len(values):
        return {}
    points = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    return {"mean": float(np.mean(values)), **points}


Near = Callable[[Any], Iterable[int]]
"""The places of what is alike."""


def _duplicates(records: Sequence[Record], pictures: _Pictures) -> dict[str, Any]:
    """Records with the same or nearly the same picture, or question; twins are meant to share and do not count."""
    hashes = [hash.tobytes() for hash in pictures.hashes]
    questions = [record.question for record in records]
    return {
        "picture": _alike(records, pictures.owners, hashes, _near_pictures),
        "question": _alike(records, range(len(records)), questions, lambda t: TextIndex(t, TEXT_SIMILARITY).near),
        "limits": {"picture": f"{IMAGE_DISTANCE} of 256 bits", "question": f"similarity {TEXT_SIMILARITY:.0f} of 100"},
    }


def _near_pictures(hashes: Sequence[bytes]) -> Near:
    index = ImageIndex(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32), IMAGE_DISTANCE)
    return lambda hash: index.near(np.frombuffer(hash, np.uint8)).tolist()


def _alike(
    records: Sequence[Record], owners: Sequence[int], values: Sequence[Any], near: Callable[[Sequence[Any]], Near]
) -> dict[str, Any]:
    """How many records have a near-duplicate: any, one in another split, one of the other risk; examples of the second."""
    own = [records[owner] for owner in owners]
    within, across, labels = (
        _partners([record.cluster for record in own], values, near, kinds)
        for kinds in (None, [_split(record) for record in own], [record.risky for record in own])
    )
    pairs = sorted({(min(pair), max(pair)) for pair in across.items()})[:SHOWN]
    return {
        "records": len({owners[i] for i in within}),
        "records_across_splits": len({owners[i] for i in across}),
        "records_risky_harmless": len({owners[i] for i in labels}),
        "examples": [[own[i].id, own[j].id] for i, j in pairs],
    }


def _partners(
    clusters: Sequence[str],
    values: Sequence[Any],
    near: Callable[[Sequence[Any]], Near],
    kinds: Sequence[Hashable] | None,
) -> dict[int, int]:
    """Place of a value → one that is like it, of another cluster and, where there are kinds, of another kind.

    One is enough, so that many values that are all alike cost no more than others.
    """
    found: dict[int, int] = {}
    for kind in dict.fromkeys(kinds or [None]):
        asking = [i for i in range(len(values)) if i not in found and (kinds is None or kinds[i] != kind)]
        if not asking:
            continue
        shelf: dict[Any, list[int]] = {}  # of equal values two of different clusters do for all
        for i, value in enumerate(values):
            same = shelf.setdefault(value, []) if kinds is None or kinds[i] == kind else None
            if same is not None and len(same) < 2 and all(clusters[j] != clusters[i] for j in same):
                same.append(i)
        distinct = [*shelf]
        like = near(distinct)
        for i in asking:
            partners = (j for place in like(values[i]) for j in shelf[distinct[place]] if clusters[j] != clusters[i])
            if (first := next(partners, None)) is not None:
                found[i] = first
    return found
