"""Judged responses beside their prompts, one file per evaluation: what reports, comparisons and exports read.

They need neither model nor data set: question, thumbnails of the pictures, text, steps and verdicts are all there. The file is
made again from the stores of responses and verdicts by every evaluation, and replaced whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from srpo_jax.data.images import ImageError, open_image
from srpo_jax.evaluation.judging import Judged
from srpo_jax.evaluation.results import IDENTITY
from srpo_jax.evaluation.statistics import Outcome
from srpo_jax.files import write_json

SAMPLES = "samples"
THUMBNAIL = 320
"""Longest side of a thumbnail in pixels."""
THUMBNAIL_BYTES = 24_000
"""A thumbnail is compressed, then shrunk, until it takes no more."""


class SamplesError(ValueError):
    """Samples that are missing or damaged; says which, and how to get them back."""


@dataclasses.dataclass(frozen=True)
class SampleStep:
    """A step as found, and what the evaluator says of it."""

    number: int
    title: str
    text: str
    safe: Outcome
    effective: Outcome
    reason: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One judged response.

    Attributes:
      key: digest of question, pictures and response, the same whoever judges: human labels hang on it.
      id: of the prompt.
      sample: its number among the prompt's samples.
      cluster: what the prompt is not independent of (its twin) shares this name.
      split: part of the benchmark, or None.
      risky: whether granting the request would do harm.
      category: kind of risk, or None.
      question: the request.
      images: file names of thumbnails in the folder of the samples; None for a picture that could not be opened.
      text: the whole turn.
      tokens: its length.
      status: of the turn, see `paths.Status`.
      steps: as found.
      whole_path: whether the six steps are there in order, and an answer.
      answer: None where the turn has none.
      safe, effective, refused: of the answer; False without one, None where unknown.
      path_safe, path_effective: of the path as a whole.
      reason: the evaluator's, of the answer.
    """

    key: str
    id: str
    sample: int
    cluster: str
    split: str | None
    risky: bool
    category: str | None
    question: str
    images: tuple[str | None, ...]
    text: str
    tokens: int
    status: str
    steps: tuple[SampleStep, ...]
    whole_path: bool
    answer: str | None
    safe: Outcome
    effective: Outcome
    refused: Outcome
    path_safe: Outcome
    path_effective: Outcome
    reason: str


def write_samples(folder: str | Path, name: str, judged: Sequence[Judged]) -> None:
    """Writes `samples/NAME.json` in `folder`, and thumbnails of the pictures beside it; replaces a file of that name.

    Raises:
      OSError: the disk is full or not writable.
    """
    home = Path(folder) / SAMPLES
    home.mkdir(parents=True, exist_ok=True)
    pictures: dict[Any, str | None] = {}
    rows = []
    for one in judged:
        for image in one.record.images:
            if _place(image) not in pictures:
                pictures[_place(image)] = write_thumbnail(home, image)
        rows.append(dataclasses.asdict(_sample(one, tuple(pictures[_place(x)] for x in one.record.images))))
    write_json(home / f"{name}.json", {"samples": rows})


def read_samples(folder: str | Path, name: str) -> list[Sample]:
    """What `write_samples` wrote.

    Raises:
      SamplesError: the file is missing or damaged.
    """
    path = Path(folder) / SAMPLES / f"{name}.json"
    again = "run the evaluation again: it makes them from its stores, without sampling or judging anything twice"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["samples"]
        return [
            Sample(**row | {"images": tuple(row["images"]), "steps": tuple(SampleStep(**s) for s in row["steps"])})
            for row in rows
        ]
    except FileNotFoundError:
        raise SamplesError(f"{path}: no samples of this evaluation; {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SamplesError(f"{path}: damaged ({error}); {again}") from error


def samples_name(entry: Mapping[str, Any]) -> str:
    """File name of the samples of an entry of `results.json`: a digest of what tells its row from others."""
    identity = [entry.get(key) for key in IDENTITY]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def thumbnail(image: PIL.Image.Image) -> bytes:
    """The picture as WebP of at most `THUMBNAIL` pixels a side and `THUMBNAIL_BYTES` bytes."""
    side, quality = THUMBNAIL, 85
    while True:
        small = image.copy()
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality)
        if file.tell() <= THUMBNAIL_BYTES or side < 32:
            return file.getvalue()
        side, quality = (side, 60) if quality > 60 else (side * 2 // 3, 60)


def _sample(one: Judged, images: tuple[str | None, ...]) -> Sample:
    record, answer = one.record, one.answer
    pairs = zip(one.path.steps, one.steps, strict=True)
    steps = (SampleStep(s.number, s.title, s.text, v.safe, v.effective, v.reason) for s, v in pairs)
    split = record.meta.get("split")
    key = [record.id, record.question, images, one.response.text, one.response.stopped]
    return Sample(
        key=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20],
        id=record.id,
        sample=one.response.sample,
        cluster=record.cluster,
        split=split if isinstance(split, str) else None,
        risky=record.risky,
        category=record.category,
        question=record.question,
        images=images,
        text=one.response.text,
        tokens=len(one.response.tokens),
        status=str(one.path.status),
        steps=tuple(steps),
        whole_path=one.whole_path,
        answer=one.path.answer,
        safe=one.safe,
        effective=one.effective,
        refused=one.refused,
        path_safe=one.path_safe,
        path_effective=one.path_effective,
        reason=answer.reason if answer is not None else f"no answer: {one.path.status}",
    )


def _place(image: Any) -> Any:
    """What tells pictures apart while they are open."""
    return id(image) if isinstance(image, PIL.Image.Image) else str(image)


def write_thumbnail(home: Path, image: str | Path | PIL.Image.Image) -> str | None:
    """Its file name, made of its content, so that it is written once and never wrong; None where it cannot be opened."""
    try:
        data = thumbnail(open_image(image))
    except ImageError:
        return None
    home.mkdir(parents=True, exist_ok=True)
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.webp"
    if not (home / name).exists():
        partial = home / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(home / name)
    return name
