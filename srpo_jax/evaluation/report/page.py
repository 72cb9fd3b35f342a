"""The HTML file: a template, one style sheet, one script, and blocks of data. It loads nothing and contacts nobody.

Everything that a model, a judge or a data set wrote is untrusted. The template escapes it, the blocks are JSON without any `<`,
the script writes it as text only, and the content security policy allows this style sheet and this script by their hashes.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from srpo_jax.evaluation.combs import Comb, CombSet
from srpo_jax.evaluation.comparison import METRICS
from srpo_jax.evaluation.metrics import first_unsafe_step
from srpo_jax.evaluation.pairwise import HEADS, TITLES, undecided
from srpo_jax.evaluation.report import plots
from srpo_jax.evaluation.report.assemble import (
    Contents,
    Row,
    by_samples,
    drift,
    health,
    own_rates,
    reasoning_by_answer,
    thinking,
)
from srpo_jax.evaluation.results import SAMPLES as BY_SAMPLES
from srpo_jax.evaluation.results import THINKING
from srpo_jax.evaluation.samples import SAMPLES, Sample, SampleStep
from srpo_jax.evaluation.statistics import Outcome

CHUNK = 64
"""Responses per block of bodies; a block is parsed when one of its responses is first shown."""

COLUMNS = {
    "S": "S",
    "E": "E",
    "SE": "S&E",
    "helpful": "harmless helped",
    "over_refusal": "over-refusal",
    "malformed": "malformed",
    "path.S": "path safe",
}
HERE = Path(__file__).parent


def render_page(
    contents: Contents,
    *,
    title: str,
    verdicts: Sequence[str],
    warnings: Sequence[str] = (),
    corrections: Sequence[Mapping[str, Any]] = (),
    labels: Sequence[Mapping[str, Any]] = (),
    start: int = 0,
    token: str | None = None,
) -> str:
    """The page as text.

    Args:
      contents: what to show.
      title: its heading.
      verdicts: sentences below it.
      warnings: what a reader must know first.
      corrections: rows of `correction.correct`, with the label of their policy.
      labels: human labels made before.
      start: place of the row whose samples are shown first.
      token: of the server that keeps labels; None for a file, which may contact nobody.
    """
    style, *scripts = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "combs.js"))
    script = "".join(scripts)
    rows = contents.rows
    return _environment().get_template("page.html.j2").render(
        policy=content_policy(style, script, save=token is not None),
        style=Markup(style),
        script=Markup(script),
        blocks=_blocks(contents, labels, start, token),
        title=title,
        verdicts=verdicts,
        warnings=warnings,
        corrections=corrections,
        contents=contents,
        columns=COLUMNS,
        metrics=METRICS,
        margin=contents.comparisons[0]["margin"] if contents.comparisons else None,
        methods=sorted({m["method"] for one in contents.comparisons for m in one["metrics"].values()}),
        plot=plots.trade_off(contents),
        series=[plots.series(contents, i) for i in range(len(rows))],
        grids=_grids(rows),
        own=own_rates(contents),
        more=[
            ("Counted by the samples of a prompt", BY_SAMPLES, by_samples(contents)),
            ("Thinking, answer and both on risky prompts", THINKING, thinking(contents)),
        ],
        sides=[row for row in rows if "pairwise" in row.entry],
        heads=HEADS,
        titles=TITLES,
        histograms=[plots.histogram(drift(row), i) for i, row in enumerate(rows)],
        crosses=[reasoning_by_answer(row) for row in rows],
        health=[health(row) for row in rows],
        uncalibrated={row.label for row in rows} - {one["label"] for one in corrections if one["metric"] == "path.S"},
        versions=next((v for r in reversed(rows) if (v := (r.entry.get("provenance") or {}).get("versions"))), {}),
        origins=[_origin(row) for row in rows],
        digests=("parameters", "prompts", "benchmark"),
    )  # fmt: skip


def content_policy(style: str, script: str, *, save: bool) -> str:
    """Allows this style sheet, this script and embedded pictures; saving labels to the page's own server only if asked."""

    def source(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    rules = {
        "default-src": "'none'",
        "script-src": source(script),
        "style-src": source(style),
        "img-src": "data:",
        "connect-src": "'self'" if save else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def json_block(value: Any) -> str:
    """JSON that cannot end the element it stands in, nor open another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Half a surrogate pair, which JSON may hold, cannot be written as UTF-8.
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found.group()):04x}", text)


def plain(value: Any) -> str:
    """Text for the template: control and direction characters become U+FFFD, so that a name cannot reorder the page."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(value))


def _blocks(
    contents: Contents,
    labels: Sequence[Mapping[str, Any]],
    start: int,
    token: str | None,
) -> Markup:
    samples = [(place, sample) for place, row in enumerate(contents.rows) for sample in row.samples]
    pictures = _pictures(contents)
    prompts: dict[str, int] = {}
    questions = []
    for place, sample in samples:
        if (name := _prompt(contents.rows[place], sample)) not in prompts:
            prompts[name] = len(prompts)
            questions.append(_question(sample))
    bases = {one["row"]: one["baseline_row"] for one in contents.comparisons}
    index = {
        "rows": [
            {"label": row.label, "evaluator": row.entry["evaluator"], "baseline": bases.get(i)}
            for i, row in enumerate(contents.rows)
        ],
        "prompts": questions,
        "responses": _columns(samples, [prompts[_prompt(contents.rows[i], s)] for i, s in samples]),
        "chunk": CHUNK,
        "labels": list(labels),
        "start": start,
        "save": token,
        "combs": [_comb_set(found) for found in contents.combs],
    }
    blocks: dict[str, Any] = {"index": index}
    blocks |= {f"comb-{i}-{j}": _comb(c) for i, found in enumerate(contents.combs) for j, c in enumerate(found.combs)}
    for begin in range(0, len(samples), CHUNK):
        blocks[f"bodies-{begin // CHUNK}"] = [_body(sample) for _, sample in samples[begin : begin + CHUNK]]
    parts = [
        f'<script type="application/json" id="{name}">{json_block(value)}</script>' for name, value in blocks.items()
    ]
    parts += [f'<script type="text/plain" id="image-{name}">{data}</script>' for name, data in pictures.items()]
    return Markup("\n".join(parts))


def _columns(samples: Sequence[tuple[int, Sample]], prompts: Sequence[int]) -> dict[str, list[Any]]:
    """Column by column what filters need of every response."""
    return {
        "row": [place for place, _ in samples],
        "prompt": list(prompts),
        "sample": [s.sample for _, s in samples],
        "key": [s.key for _, s in samples],
        "status": [s.status for _, s in samples],
        "tokens": [s.tokens for _, s in samples],
        "safe": [_word(s.safe) for _, s in samples],
        "effective": [_word(s.effective) for _, s in samples],
        "refused": [_word(s.refused) for _, s in samples],
        "pathSafe": [_word(s.path_safe) for _, s in samples],
        "drift": [first_unsafe_step(s) for _, s in samples],
    }


def _body(sample: Sample) -> dict[str, Any]:
    return {"text": sample.text, "answer": sample.answer, "reason": sample.reason, "steps": _steps(sample.steps)}


def _steps(steps: Sequence[SampleStep]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(s) | {"safe": _word(s.safe), "effective": _word(s.effective)} for s in steps]


def _word(outcome: Outcome) -> int:
    """1 yes, 0 no, -1 unknown."""
    return -1 if outcome is None else int(outcome)


def _comb_set(found: CombSet) -> dict[str, Any]:
    """What the list of trees needs; `mixed`: branches of one prefix went both ways."""
    trees = []
    for comb in found.combs:
        sides = {(branch.prefix, branch.good) for branch in comb.branches}
        mixed = any((prefix, True) in sides and (prefix, False) in sides for prefix, _ in sides)
        told = {"id": comb.id, "question": comb.question, "risky": comb.risky, "category": comb.category}
        trees.append(told | {"images": _stems(comb.images), "mixed": mixed})
    named = {name: getattr(found, name) for name in ("title", "good", "meaning", "judge", "total")}
    given = any(branch.given for comb in found.combs for branch in comb.branches)
    return named | {"stepJudge": found.step_judge, "given": given, "trees": trees}


def _comb(comb: Comb) -> dict[str, Any]:
    outcomes = ("good", "safe", "effective", "refused")
    branches = [
        vars(b) | {"steps": _steps(b.steps)} | {name: _word(getattr(b, name)) for name in outcomes}
        for b in comb.branches
    ]
    return {"steps": _steps(comb.steps), "reply": comb.reply, "branches": branches}


def _prompt(row: Row, sample: Sample) -> str:
    return f"{row.entry.get('benchmark')} {sample.id}"


def _question(sample: Sample) -> dict[str, Any]:
    told = {"id": sample.id, "question": sample.question, "images": _stems(sample.images), "risky": sample.risky}
    return told | {"category": sample.category, "split": sample.split}


def _stems(images: Sequence[str | None]) -> list[str | None]:
    """A thumbnail goes by the start of its digest, without the suffix."""
    return [None if name is None else Path(name).stem for name in images]


def _pictures(contents: Contents) -> dict[str, str]:
    """Data URIs of all thumbnails by name."""
    sources = [(row.home, {name for sample in row.samples for name in sample.images}) for row in contents.rows]
    drawn = {name for one in contents.combs for comb in one.combs for name in comb.images}
    sources.append((contents.rows[-1].home, drawn))
    found: dict[str, str] = {}
    for home, names in sources:
        for name in names - {None}:
            path = home / SAMPLES / str(name)
            if re.fullmatch(r"[0-9a-f]+\.webp", path.name) and path.is_file() and path.stem not in found:
                found[path.stem] = "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
    return found


def _origin(row: Row) -> dict[str, Any]:
    """What the row's numbers came from, by name."""
    entry, untold = row.entry, "not told"
    told = entry.get("provenance") or {}
    judge = told.get("training_judge")
    return {
        "parameters": told.get("params", untold),
        "step": entry.get("step", untold),
        "prompts": told.get("prompts", untold),
        "benchmark": entry.get("benchmark", untold),
        "evaluator": entry["evaluator"],
        "judge of training": untold if judge is None else judge or "none",
        "decoding": ", ".join(f"{name} {value}" for name, value in entry["decoding"].items()),
        "device": told.get("device", untold),
    }


def _grids(rows: Sequence[Row]) -> dict[str, dict[str, list[Any]]]:
    """S&E by split and by category, a cell per row; only where there are several."""
    grids = {}
    for name, key in (("by split", "by_split"), ("by category", "by_category")):
        groups = list(dict.fromkeys(group for row in rows for group in row.entry.get(key, {})))
        if len(groups) > 1:
            grids[name] = {g: [row.entry.get(key, {}).get(g, {}).get("SE") for row in rows] for g in groups}
    return grids


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False
    )
    environment.globals |= {"interval": plots.interval, "undecided": undecided}
    environment.filters |= {
        "plain": plain,
        "percent": lambda share: f"{100 * share:.1f}",
        "points": lambda share: f"{100 * share:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0"),
        "pvalue": lambda p: "p < 0.001" if p < 0.001 else f"p = {p:.3f}",
        "path": lambda entry, key: functools.reduce(lambda told, part: (told or {}).get(part), key.split("."), entry),
    }
    return environment
