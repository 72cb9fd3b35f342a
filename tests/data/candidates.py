"""A data set on disk, for tests of what reads one: the embedded world's records with pictures and the builder's meta."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srpo_jax.data import scenes
from srpo_jax.data.records import Record


def write_world(
    folder: Path,
    count: int = 12,
    splits: tuple[str, ...] = ("train",),
    change: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """Writes `count` records of each split, risky ones and their twins in turn, as candidates.jsonl with images/.

    `change` may change the line of a record before it is written.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = [record for split in splits for record in scenes.records(split, count)]
    lines = [_line(folder, number, record) for number, record in enumerate(records)]
    for line in lines:
        change(line)
    path = folder / "candidates.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _line(folder: Path, number: int, record: Record) -> dict[str, Any]:
    name = f"images/{number:04}.png"
    record.images[0].save(folder / name)  # type: ignore[union-attr]
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    image = {"source": "the embedded world", "licence": "Apache-2.0", "sha256": digest}
    found = [{"check": "length", "field": "steps.2", "level": "warning", "text": "shorter than most second steps"}]
    return {
        "id": record.id,
        "images": [name],
        "question": record.question,
        "risky": record.risky,
        "category": record.category,
        "steps": list(record.steps),
        "safe_reply": record.safe_reply,
        "unsafe_reply": record.unsafe_reply,
        "twin": record.twin,
        "meta": {
            "split": record.meta["split"],
            "provenance": {"image": image, "stages": [], "synthetic": True},
            "findings": found if number % 3 == 0 else [],
            "marks": [] if record.risky else ["harmless twin"],
        },
    }
