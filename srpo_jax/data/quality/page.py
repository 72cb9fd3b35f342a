"""The quality report as one HTML file: no script, no network, nothing of a record that could act."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from srpo_jax.data.images import ImageError, open_image
from srpo_jax.data.records import Record

HERE = Path(__file__).parent
SAMPLES = 24
THUMBNAIL = 200
LONGEST = 600
"""Characters of a text that are shown."""


def render_page(measured: Mapping[str, Any], records: Sequence[Record], *, title: str, seed: int = 0) -> str:
    """The page as text.

    Args:
      measured: what `measure.measure` gives for `records`.
      records: of which samples are drawn, blurred until they are chosen.
      title: its heading.
      seed: of the samples.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    drawn = random.Random(seed).sample(list(records), min(SAMPLES, len(records)))
    samples = [(record, *_thumbnail(record)) for record in drawn]
    template = _environment().get_template("page.html.j2")
    return template.render(m=measured, samples=samples, title=title, style=Markup(style), policy=policy)


def findings(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know first: (level, sentence), the grave ones before the others."""
    told = []
    for name, one in measured["leakage"].items():
        if one["verdict"] == "not measured":
            told.append(("warning", f"Whether the {name} alone gives risk away was not measured: {one['reason']}."))
            continue
        auc, accuracy = one["auc"], one["accuracy"]
        figures = (
            f"AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}], accuracy {100 * accuracy['value']:.1f} %"
        )
        if one["verdict"] == "leak":
            told.append(("error", f"The {name} alone gives risk away: {figures}."))
        else:
            told.append(("good", f"No leak was found in the {name} alone: {figures}."))
    if bad := measured["pictures"]["unreadable"]:
        told.append(("error", f"{len(bad)} of {measured['pictures']['files']} pictures cannot be opened."))
    for kind in ("picture", "question"):
        if count := measured["duplicates"][kind]["records_across_splits"]:
            told.append(("error", f"{count} records have nearly the same {kind} as one in another split."))
    counts = measured["counts"]
    if lost := sum(n for status, n in counts["review"].items() if status not in ("accepted", "edited")):
        told.append(("warning", f"{lost} of {measured['records']} records were not accepted by a person."))
    share = counts["risky"] / measured["records"]
    if not 0.4 <= share <= 0.6:
        told.append(("warning", f"{100 * share:.0f} % of the records are risky; half and half does not teach refusal."))
    beyond = measured.get("tokens", {}).get("beyond_context", 0)
    if beyond:
        told.append(("error", f"{beyond} records have more tokens than the model's context."))
    return sorted(told, key=lambda one: ("error", "warning", "good").index(one[0]))


def plain(value: Any) -> str:
    """Text in which control and direction characters are U+FFFD, cut to `LONGEST`."""
    text = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(value)[: LONGEST + 1])
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _thumbnail(record: Record) -> tuple[str | None, str | None]:
    """A data URI of the first picture, or why there is none."""
    if not record.images:
        return None, "no picture"
    try:
        picture = open_image(record.images[0])
    except ImageError as error:
        return None, str(error)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), None


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"plain": plain, "number": lambda x: f"{x:,.0f}" if abs(x) >= 100 else f"{x:.4g}"}
    environment.globals["findings"] = findings
    return environment
