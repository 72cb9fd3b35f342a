"""What a report tells, as plain values: rows with their samples, comparisons, health, where paths drift."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.evaluation.benchmarks.registry import BENCHMARKS
from srpo_jax.evaluation.combs import CombSet, read_combs
from srpo_jax.evaluation.comparison import MARGIN, METRICS, ComparisonError, compare
from srpo_jax.evaluation.metrics import first_unsafe_step
from srpo_jax.evaluation.paired import holm
from srpo_jax.evaluation.results import labels, read_results
from srpo_jax.evaluation.samples import Sample, read_samples, samples_name
from srpo_jax.paths import Status

EVALUATION = "evaluation"


class ReportError(ValueError):
    """A report that cannot be made; says what is missing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An evaluation.

    Attributes:
      label: for people, different for every row.
      entry: of `results.json`.
      samples: its judged responses.
      home: folder of its thumbnails.
    """

    label: str
    entry: Mapping[str, Any]
    samples: Sequence[Sample]
    home: Path

    @property
    def setting(self) -> tuple[str, ...]:
        """Only rows of one setting are compared: same benchmark, same evaluator, same decoding."""
        return tuple(json.dumps(self.entry.get(key), sort_keys=True) for key in ("benchmark", "evaluator", "decoding"))

    @property
    def self_judged(self) -> bool:
        """Whether the judge that trained the policy also evaluates it."""
        judge = (self.entry.get("provenance") or {}).get("training_judge")
        return bool(judge) and judge == self.entry["evaluator"]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything a report shows.

    Attributes:
      rows: evaluations, a baseline's first.
      references: entries of constant policies, of the benchmarks of the rows.
      comparisons: from `comparison.compare`, with `row` and `baseline_row`, places in `rows`.
      combs: reasoning trees; their thumbnails are in the folder of the last row.
    """

    rows: list[Row]
    references: list[Mapping[str, Any]]
    comparisons: list[dict[str, Any]]
    combs: list[CombSet]


def assemble(
    workdir: str | Path, baseline: str | Path | None = None, *, against: str | None = None, margin: float = MARGIN
) -> Contents:
    """Reads the evaluations of a work directory, and of a baseline's, and compares them.

    Each row is compared with the baseline's row of the same benchmark and decoding: the first such row of `baseline`, else of
    `workdir`.

    Args:
      workdir: holds `results.json` and `evaluation/`.
      baseline: another one; None takes the baseline from `workdir`.
      against: name of the baseline's rows; None takes the first.
      margin: of non-inferiority, as a share.

    Raises:
      ReportError: nothing was evaluated there, no row is called `against`, or the baseline has no row to compare with.
      samples.SamplesError: the judged responses of a row are missing.
      combs.CombsError: damaged trees.
      results.ResultsError: a damaged `results.json`.
    """
    theirs, more = _rows(baseline) if baseline is not None else ([], [])
    ours, references = _rows(workdir)
    names = _labels([row.entry for row in theirs + ours])
    rows = [dataclasses.replace(row, label=name) for row, name in zip(theirs + ours, names, strict=True)]
    if len(set(names)) < len(names):  # the same row in both folders
        marks = ["baseline: "] * len(theirs) + [""] * len(ours)
        rows = [dataclasses.replace(row, label=mark + row.label) for row, mark in zip(rows, marks, strict=True)]
    benchmarks = {row.entry.get("benchmark") for row in rows}
    constant = {str((r["name"], r.get("benchmark"))): r for r in more + references if r.get("benchmark") in benchmarks}
    pool = range(len(theirs)) if baseline is not None else range(len(rows))
    tested = [i for i in range(len(rows)) if baseline is None or i >= len(theirs)]
    comparisons = _comparisons(rows, pool, tested, against, margin)
    return Contents(rows, list(constant.values()), comparisons, read_combs(Path(workdir) / EVALUATION))


def _labels(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels that differ within every task, with the task in front where it has a name."""
    found = [""] * len(entries)
    for task in dict.fromkeys(entry.get("task") for entry in entries):
        places = [i for i, entry in enumerate(entries) if entry.get("task") == task]
        for place, label in zip(places, labels([entries[i] for i in places]), strict=True):
            found[place] = label if task is None else f"{task}: {label}"
    return found


def _rows(workdir: str | Path) -> tuple[list[Row], list[Mapping[str, Any]]]:
    home = Path(workdir) / EVALUATION
    results = read_results(Path(workdir) / "results.json")
    if not results["evaluations"]:
        raise ReportError(f"{workdir}: nothing was evaluated there; run scripts/evaluate.py --workdir={workdir} first")
    rows = [Row("", entry, read_samples(home, samples_name(entry)), home) for entry in results["evaluations"]]
    return rows, list(results.get("references", []))


def _comparisons(
    rows: Sequence[Row], pool: Sequence[int], tested: Sequence[int], against: str | None, margin: float
) -> list[dict[str, Any]]:
    if against is not None and not any(rows[i].entry["name"] == against for i in pool):
        there = sorted({str(rows[i].entry["name"]) for i in pool})
        raise ReportError(f"no baseline row is called {against!r}; there are {', '.join(there)}")
    found = []
    for place in tested:
        row = rows[place]
        same = [i for i in pool if rows[i].setting == row.setting and against in (None, rows[i].entry["name"])]
        if not same or same[0] == place:
            continue
        other = rows[same[0]]
        try:
            one = compare(row.samples, other.samples, names=(row.label, other.label), margin=margin)
        except ComparisonError as error:
            raise ReportError(f"{row.label} and {other.label}: {error}") from error
        found.append(one | {"row": place, "baseline_row": same[0], "benchmark": row.entry.get("benchmark")})
    if tested != list(pool) and not found:
        raise ReportError(
            "the baseline has no row of the same benchmark and decoding; evaluate it under the same configuration"
        )
    _adjust(rows, found)
    return found


def _adjust(rows: Sequence[Row], comparisons: Sequence[dict[str, Any]]) -> None:
    """Holm's p over the benchmarks of one policy and decoding."""
    families: dict[str, list[dict[str, Any]]] = {}
    for one in comparisons:
        entry = rows[one["row"]].entry
        families.setdefault(str((entry["name"], entry.get("step"), entry["decoding"])), []).append(one)
    for family in families.values():
        for metric in METRICS:
            tested = [one["metrics"][metric.name] for one in family if metric.name in one["metrics"]]
            for told, p in zip(tested, holm([t["p"] for t in tested]), strict=True):
                told["p_holm"] = p


def health(row: Row) -> dict[str, int]:
    """How many responses of a row are sound, and what is wrong with the others; kinds may overlap."""
    samples = row.samples
    return {
        "responses": len(samples),
        "truncated": sum(s.status == Status.TRUNCATED for s in samples),
        "unparsed": sum(s.status not in (Status.OK, Status.TRUNCATED) for s in samples),
        "other steps": sum(s.status == Status.OK and not s.whole_path for s in samples),
        "judge unknown": sum(None in (s.safe, s.effective) for s in samples),
        "missing images": sum(None in s.images for s in samples),
    }


def drift(row: Row) -> dict[str, int]:
    """Risky responses by `metrics.first_unsafe_step`, in order of the steps."""
    found = Counter(first_unsafe_step(s) for s in row.samples if s.risky)
    return {name: found[name] for name in ("1", "2", "3", "4", "5", "6", "none", "unknown", "malformed")}


def reasoning_by_answer(row: Row) -> dict[str, int]:
    """Risky responses by safety of path and answer, as "path answer": yes, no or unknown; "malformed" without a whole path."""
    word = {True: "yes", False: "no", None: "unknown"}
    risky = [s for s in row.samples if s.risky]
    return dict(Counter(f"{word[s.path_safe]} {word[s.safe]}" if s.whole_path else "malformed" for s in risky))


def by_samples(contents: Contents) -> list[tuple[str, Mapping[str, Any]]]:
    """Of rows with several samples of a prompt: label and rates by any, all and the majority of them."""
    told = [(row.label, row.entry["samples"]) for row in contents.rows if row.entry.get("samples")]
    return [(f"{label}, {how} of its samples", rates) for label, ways in told for how, rates in ways.items()]


def thinking(contents: Contents) -> list[tuple[str, Mapping[str, Any]]]:
    """Of rows whose reasoning was judged: label and rates of thinking, answer and both, families of benchmarks together."""
    found = []
    for row in contents.rows:
        told = row.entry.get("thinking") or {}
        rate, task = told.get("thinking") or {}, str(row.entry.get("task"))
        if rate.get("n") and rate["unknown"] < 1:
            found.append((BENCHMARKS[task].family if task in BENCHMARKS else "", row.label, told))
    found.sort(key=lambda one: one[0])
    return [(f"{family}: {label}" if family else label, told) for family, label, told in found]


def own_rates(contents: Contents) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """The rates that a benchmark itself reports, rows of label and rates by task; reference rows last."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    named = [(row.label, row.entry) for row in contents.rows]
    for label, entry in [*named, *((str(entry["name"]), entry) for entry in contents.references)]:
        if rates := entry.get("rates"):
            point = {"low": None, "high": None, "unknown": 0}  # a number without interval
            told = {name: rate if isinstance(rate, dict) else {"rate": rate, **point} for name, rate in rates.items()}
            found.setdefault(str(entry.get("task")), []).append((label, told))
    return found
