"""The reviewed data set and its audit trail.

* records.jsonl: the records that people kept, as they left them, each with `meta.review`; `load_jsonl` reads it.
* images/: their pictures, byte for byte those that were looked at.
* audit.jsonl: every decision, undo and refused write in order, then each record's outcome; drafts stay in the log.
* unsafe_replies.jsonl: where they were kept apart, those that all who kept the record had opened; no other file tells them.
* summary.json: counts and the reviewers' agreement.
* README.md: the data card of what was reviewed, where there is one, and what the review did to it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo_jax.data.apart import APART
from srpo_jax.data.records import Record
from srpo_jax.data.review import decisions
from srpo_jax.data.review.agreement import agreement
from srpo_jax.data.review.decisions import Outcome, Status
from srpo_jax.data.review.session import LOG, Review
from srpo_jax.files import read_family, write_json

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""Endings that a copied picture keeps."""


CARD = "README.md"
REVIEWED = """
## Review

People decided about {decided} of {records} records and kept {exported}, {edited} of them edited. The counts above are of the
candidates; those of this data set, and the reviewers' agreement, are in summary.json, every decision is in audit.jsonl.
"""


def export(review: Review, folder: str | Path, target: str | Path, card: str | Path | None = None) -> dict[str, Any]:
    """Writes the data set; it appears whole, by one rename.

    Only records with an outcome take part; undecided ones are counted. A link to a twin that is not kept, or that an edit made
    as risky as its twin, is cut, and `meta.review` tells so.

    Args:
      review: what is exported.
      folder: of the review, where its log lies.
      target: new or empty.
      card: data card of the candidates, which the data set takes with it; a file that is not there is none.

    Returns:
      The summary.

    Raises:
      ValueError: nothing was kept, `target` holds something, or an image is not the one that was reviewed.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; choose a new folder for the reviewed data set")
    outcomes = {i: found for i in range(len(review.records)) if (found := review.outcome(i)) is not None}
    kept = {i: found for i, found in outcomes.items() if found.status.kept}
    if not kept:
        raise ValueError(f"none of the {len(outcomes)} decided records was kept; there is nothing to export")
    records = {review.records[i].id: decisions.revised(review.records[i], found.edits) for i, found in kept.items()}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    (partial / "images").mkdir(parents=True)
    lines, apart = [], []
    for index, found in kept.items():
        before, after = review.records[index], records[review.records[index].id]
        told = _told(before, found)
        if before.id in review.apart:
            edit = told["edits"].pop("unsafe_reply", None)
            told["unsafe_reply"] = _fate(after, found, edited=edit is not None)
            if found.opened and after.risky and after.unsafe_reply is not None:
                apart.append({"id": after.id, "unsafe_reply": after.unsafe_reply, "edit": edit, "review": told})
            after = dataclasses.replace(after, unsafe_reply=None)
        lines.append(_line(after, _copy_images(before, found, partial), dict(told), records))
    _write_lines(partial / "records.jsonl", lines)
    if review.apart:
        _write_lines(partial / APART, apart, 0o600)
    _write_lines(partial / "audit.jsonl", _audit(review, folder, outcomes))
    summary = _summary(review, outcomes, lines)
    write_json(partial / "summary.json", summary)
    if card is not None and Path(card).is_file():
        counts = {"decided": len(outcomes), "edited": summary["outcomes"].get(Status.EDITED, 0)}
        text = Path(card).read_text(encoding="utf-8").rstrip("\n") + "\n" + REVIEWED.format(**summary | counts)
        (partial / CARD).write_text(text, encoding="utf-8")
    partial.replace(target)
    return summary


def _line(record: Record, images: list[str], told: dict[str, Any], kept: Mapping[str, Record]) -> dict[str, Any]:
    """A line of records.jsonl."""
    twin = record.twin
    if twin is not None and (twin not in kept or kept[twin].risky == record.risky):
        told["unlinked_twin"], twin = twin, None
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return values | {"images": images, "twin": twin, "meta": dict(record.meta) | {"review": told}}


def _told(record: Record, found: Outcome) -> dict[str, Any]:
    """`meta.review` of a kept record."""
    before = decisions.fields(record)
    told = {
        "status": found.status,
        "reviewers": [one.reviewer for one in found.decisions],
        "adjudicated": found.adjudicated,
        "time": found.decisions[-1].time,
        "edits": {name: {"before": before[name], "after": text} for name, text in found.edits.items()},
        "notes": {one.reviewer: one.note for one in found.decisions if one.note},
    }
    earlier = record.meta.get("review")
    return told | ({} if earlier is None else {"earlier": earlier})


def _fate(record: Record, found: Outcome, edited: bool) -> str:
    """What became of an unsafe reply that is kept apart, without its words."""
    if not found.opened:
        return "left out: not all who kept the record had opened it"
    if record.unsafe_reply is None or not record.risky:
        return "removed"
    return f"{'edited' if edited else 'kept'}, in {APART}"


def _copy_images(record: Record, found: Outcome, target: Path) -> list[str]:
    """Copies what the last of those who kept the record looked at; names in images/, made from the content."""
    reviewed = next(one.images for one in reversed(found.decisions) if one.status.kept)
    names = []
    for image, digest in zip(record.images, reviewed, strict=True):
        path = Path(str(image))
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"record {record.id!r}: {path} is not the image that was reviewed; restore it or review again"
            )
        suffix = path.suffix.lower()
        names.append(f"images/{digest}{suffix if suffix in SUFFIXES else ''}")
        (target / names[-1]).write_bytes(content)
    return names


def _audit(review: Review, folder: str | Path, outcomes: Mapping[int, Outcome]) -> list[dict[str, Any]]:
    events = [event for event in read_family(Path(folder) / LOG) if event["event"] not in ("draft", "skip")]
    before = {record.id: decisions.fields(record) for record in review.records}
    for event in events:
        texts = before.get(event.get("record", ""), {})
        event["edits"] = {n: {"before": texts.get(n), "after": a} for n, a in event.get("edits", {}).items()}
        if event.get("apart"):
            event["edits"]["unsafe_reply"] = APART  # where it stands, if it was exported; the words are in the log
    return events + [
        {
            "event": "outcome",
            "record": review.records[index].id,
            "status": found.status,
            "adjudicated": found.adjudicated,
        }
        for index, found in outcomes.items()
    ]


def _summary(review: Review, outcomes: Mapping[int, Outcome], lines: list[dict[str, Any]]) -> dict[str, Any]:
    reviews = [line["meta"]["review"] for line in lines]
    differ = [i for i in range(len(review.records)) if i not in outcomes and len(review.decided(i)) > 1]
    return {
        "records": len(review.records),
        "exported": len(lines),
        "outcomes": dict(collections.Counter(str(found.status) for found in outcomes.values())),
        "undecided": len(review.records) - len(outcomes) - len(differ),
        "waiting_for_an_adjudicator": len(differ),
        "adjudicated": sum(found.adjudicated for found in outcomes.values()),
        "risky": sum(line["risky"] for line in lines),
        "unsafe_replies_apart": dict(
            collections.Counter(told["unsafe_reply"] for told in reviews if "unsafe_reply" in told)
        ),
        "unlinked_twins": sum("unlinked_twin" in told for told in reviews),
        "decisions_on_other_versions": review.outdated,
        "agreement": agreement(review),
    }


def _write_lines(path: Path, lines: list[dict[str, Any]], mode: int = 0o644) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
