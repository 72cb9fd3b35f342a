"""The data card: README.md of a data set, with what it is for, who may have it, and how to get something out of it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from srpo_jax.data.records import Record

if TYPE_CHECKING:
    from srpo_jax.data.builder.build import BuildConfig

TEMPLATE = Path(__file__).parent / "card.md.jinja"


def write_card(
    path: Path, records: Sequence[Record], config: BuildConfig, canary: str, looked: bool, table: str
) -> None:
    """Writes the card of a data set that was built.

    Args:
      path: the file; an older one is replaced.
      records: those of the data set.
      config: how it was built.
      canary: its string for searches in training corpora.
      looked: whether a model or hook looked at every picture first.
      table: the yield table as text.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    environment.filters["plain"] = plain
    stages = [stage for record in records for stage in record.meta["provenance"]["stages"]]
    images = [record.meta["provenance"]["image"] for record in records]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        canary=canary,
        looked=looked,
        table=table,
        total=len(records),
        risky=sum(record.risky for record in records),
        categories=sorted(collections.Counter(r.category for r in records if r.category).items()),
        splits=sorted(collections.Counter(str(record.meta["split"]) for record in records).items()),
        licences=sorted(collections.Counter(image["licence"] for image in images).items()),
        models=sorted({(stage["agent"], stage["model"]) for stage in stages}),
        templates=sorted({(stage["template"], stage["version"], stage["sha256"]) for stage in stages}),
        marks=sorted(collections.Counter(mark for record in records for mark in record.meta["marks"]).items()),
        findings=sorted(collections.Counter(f["check"] for r in records for f in r.meta["findings"]).items()),
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def plain(text: object) -> str:
    """Foreign text on one line, without marks that Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    return "".join(f"&#{ord(c)};" if c in "&<>[]()!|`*_#~\\" else c for c in line)
