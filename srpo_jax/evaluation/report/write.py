"""Writes `report.html` and `report.md` of a work directory, and what they add to `results.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srpo_jax.evaluation.comparison import MARGIN
from srpo_jax.evaluation.correction import correct
from srpo_jax.evaluation.human import LABELS, HumanLabel, read_labels
from srpo_jax.evaluation.pairwise import biased, render_pairwise
from srpo_jax.evaluation.report.assemble import Contents, assemble, by_samples, drift, health, thinking
from srpo_jax.evaluation.report.page import plain, render_page
from srpo_jax.evaluation.results import SAMPLES, THINKING, read_results, render, table
from srpo_jax.files import write_json

REPORT = "report.html"
FAULTS = {
    "judge unknown": "The evaluator could not tell about some responses, which count against their policy",
    "missing images": "Pictures of some prompts could not be opened",
}
"""What `assemble.health` counts and a reader must know first."""


def write_report(
    workdir: str | Path,
    baseline: str | Path | None = None,
    *,
    against: str | None = None,
    margin: float = MARGIN,
    title: str | None = None,
) -> Path:
    """Writes `report.html` and `report.md`, and puts comparisons and corrected rates into `results.json`.

    Human labels are read from `labels.json` of the work directory, where there is one.

    Args:
      workdir: holds `results.json` and `evaluation/`.
      baseline: work directory of the baseline; None compares within `workdir`.
      against: name of the baseline's rows; None takes the first of the same benchmark and decoding.
      margin: of non-inferiority, as a share.
      title: of the report.

    Returns:
      The HTML file.

    Raises:
      assemble.ReportError: there is nothing to report or to compare with.
      samples.SamplesError: the judged responses of a row are missing.
      human.LabelsError: `labels.json` is damaged.
    """
    workdir = Path(workdir)
    contents = assemble(workdir, baseline, against=against, margin=margin)
    labels = read_labels(workdir / LABELS) if (workdir / LABELS).exists() else []
    page = build_page(contents, title=title, labels=labels)
    results = read_results(workdir / "results.json")
    if labels:
        results["corrections"] = corrections(contents, labels)
    kept = ("row", "baseline_row")  # places in the report, nowhere else
    results["comparisons"] = [{k: v for k, v in one.items() if k not in kept} for one in contents.comparisons]
    write_json(workdir / "results.json", results)
    _write(workdir / "report.md", markdown(contents, title))
    return _write(workdir / REPORT, page)


def build_page(
    contents: Contents,
    *,
    title: str | None = None,
    token: str | None = None,
    labels: Sequence[HumanLabel] = (),
    **parts: Any,
) -> str:
    """The page of what was assembled; `parts` are those of `render_page`."""
    parts |= {"labels": [dataclasses.asdict(label) for label in labels], "corrections": corrections(contents, labels)}
    parts |= {"verdicts": headlines(contents), "warnings": warnings(contents)}
    return render_page(contents, title=title or _title(contents), start=_last(contents), token=token, **parts)


def corrections(contents: Contents, labels: Sequence[HumanLabel]) -> list[dict[str, Any]]:
    """Corrected rates of every row that has blind labels; see `correction.correct`."""
    return [{"label": row.label, **one} for row in contents.rows for one in correct(row.samples, labels)]


def headlines(contents: Contents) -> list[str]:
    """The verdicts of the policy evaluated last, or what there is to say without a baseline."""
    name = contents.rows[-1].entry["name"]
    found = [one["verdict"] for one in contents.comparisons if contents.rows[one["row"]].entry["name"] == name]
    if found:
        return found
    entry, label = contents.rows[-1].entry, contents.rows[-1].label
    rate = entry["SE"] if entry["SE"]["rate"] is not None else entry["helpful"]
    what = "risky prompts safely and effectively" if rate is entry["SE"] else "harmless prompts with help"
    if rate["rate"] is None:
        return [f"{label}: no prompts."]
    low, value, high = (100 * rate[key] for key in ("low", "rate", "high"))
    told = f"{label} answers {value:.1f} % [{low:.1f}, {high:.1f}] of {rate['n']} {what}"
    return [f"{told}. Nothing was compared: there is no baseline."]


def warnings(contents: Contents) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    for row in contents.rows:
        if row.self_judged:
            found.append(
                f"{row.label} was trained with the judge that evaluates it ({row.entry['evaluator']}): its rates show how well "
                "it pleases that judge. Evaluate it with a judge that training never saw."
            )
        if lean := biased(row.entry.get("pairwise") or {"rows": ()}):
            found.append(
                f"The judge that compared answers of {row.label} with the baseline's leans to a place: {'; '.join(lean)}. Only "
                "what it says in both orders is a win or a loss."
            )
    for kind, what in FAULTS.items():
        counts = {row.label: told for row in contents.rows if (told := health(row))[kind]}
        if counts:
            told_of = ", ".join(f"{name} {told[kind]} of {told['responses']}" for name, told in counts.items())
            found.append(f"{what}: {told_of}.")
    return found


def markdown(contents: Contents, title: str | None = None) -> str:
    """The report in short."""
    lines = [f"# {plain(title or _title(contents))}", ""]
    lines += [
        line
        for text in (*headlines(contents), *(f"**Note.** {w}" for w in warnings(contents)))
        for line in (plain(text), "")
    ]
    entries = [{**row.entry, "name": plain(row.entry["name"])} for row in contents.rows]
    lines += [render({"evaluations": entries, "references": contents.references}, splits=False)]
    for rows, columns in ((by_samples(contents), SAMPLES), (thinking(contents), THINKING)):
        if rows:
            lines += [*table([(plain(label), rates) for label, rates in rows], columns), ""]
    lines += ["| policy | first unsafe step 1 | 2 | 3 | 4 | 5 | 6 | none | unknown | no path |", "|" + "---|" * 10]
    lines += ["| " + " | ".join([plain(row.label), *map(str, drift(row).values())]) + " |" for row in contents.rows]
    lines += ["", "| policy | " + " | ".join(health(contents.rows[0])) + " |", "|" + "---|" * 7]
    lines += ["| " + " | ".join([plain(row.label), *map(str, health(row).values())]) + " |" for row in contents.rows]
    if len(contents.comparisons) > len(headlines(contents)):
        lines += ["", "All comparisons:", ""]
        lines += [
            f"- {plain(one['policy'])} against {plain(one['baseline'])}: {plain(one['verdict'])}"
            for one in contents.comparisons
        ]
    for row in contents.rows:
        if told := row.entry.get("pairwise"):
            lines += ["", f"{plain(row.label)} against {plain(told['baseline']['name'])}, side by side in both orders,"]
            lines += [f"by {plain(told['judge'])}:", "", render_pairwise(told).rstrip()]
    return "\n".join(lines) + "\n"


def _title(contents: Contents) -> str:
    names = list(dict.fromkeys(str(row.entry["name"]) for row in contents.rows))
    return names[0] if len(names) == 1 else f"{' and '.join(names[:0:-1])} against {names[0]}"


def _last(contents: Contents) -> int:
    """The row to begin with: the last policy, sampled rather than greedy where there are both."""
    name = contents.rows[-1].entry["name"]
    return max(i for i, row in enumerate(contents.rows) if row.entry["name"] == name)


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
