"""`results.json` and its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.files import write_json

COLUMNS = {
    "S": "S",
    "E": "E",
    "SE": "S&E",
    "helpful": "harmless helpful",
    "over_refusal": "over-refusal",
    "malformed": "malformed",
}

THINKING = {
    "thinking": "thinking safe",
    "answer": "answer safe",
    "whole": "both safe",
    "hidden": "unsafe thinking, safe answer",
}
SAMPLES = {name: COLUMNS[name] for name in ("S", "E", "SE", "over_refusal")}
"""Rates of `metrics.samples`."""

IDENTITY = ("name", "step", "evaluator", "decoding", "benchmark")
"""What tells rows apart."""

ASKED_APART = ("pairwise", "interventions")
"""What an evaluation finds on demand alone."""


class ResultsError(ValueError):
    """A file that is no `results.json`."""


def read_results(path: str | Path) -> dict[str, Any]:
    """What `results.json` holds; without the file, no evaluations.

    Raises:
      ResultsError: it is not what `add_result` writes.
    """
    path = Path(path)
    if not path.exists():
        return {"evaluations": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not valid JSON ({error}); repair it or move it away") from error
    entries = results.get("evaluations") if isinstance(results, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and {"name", "decoding"} <= e.keys() for e in entries
    ):
        raise ResultsError(f'{path} holds no list "evaluations" of named entries; repair it or move it away')
    return results


def add_result(
    path: str | Path, entry: Mapping[str, Any], references: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Adds an evaluation to `results.json`, or replaces that of the same `IDENTITY` in its place.

    What was `ASKED_APART` stays where it is not asked again, as long as the row is of the same parameters and prompts.

    Args:
      path: the file; written so that a reader sees the old or the new one, never a part.
      entry: from `evaluate`.
      references: rows of constant policies, kept apart under "references"; they replace those of the same benchmark.

    Returns:
      The new contents.
    """
    results = read_results(path)
    _put(results["evaluations"], entry)
    for reference in references:
        _put(results.setdefault("references", []), reference)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    return results


def _put(rows: list[dict[str, Any]], row: Mapping[str, Any]) -> None:
    """Replaces the row of the same identity in its place, else appends."""
    what = [[other.get(key) for key in IDENTITY] for other in rows]
    mine = [row.get(key) for key in IDENTITY]
    if mine not in what:
        rows.append(dict(row))
        return
    place = what.index(mine)
    old = rows[place] if _answers(rows[place]) == _answers(row) else {}
    rows[place] = {key: old[key] for key in ASKED_APART if key in old} | dict(row)


def _answers(row: Mapping[str, Any]) -> list[Any]:
    """What a row's answers depend on beside its identity."""
    told = row.get("provenance") or {}
    return [told.get("params"), told.get("prompts")]


def render(results: Mapping[str, Any], *, splits: bool = True) -> str:
    """Markdown tables that also read well as text, task by task: all prompts, the benchmark's own rates, each split.

    Rows are evaluations in order, then the reference policies; cells are percentages with their 95 % interval.
    """
    rows = [*results["evaluations"], *results.get("references", [])]
    tasks = {row.get("task"): [other for other in rows if other.get("task") == row.get("task")] for row in rows}
    told = [f"## {task}\n\n{_render(some, splits)}" if task else _render(some, splits) for task, some in tasks.items()]
    return "\n".join(told)


def _render(rows: Sequence[Mapping[str, Any]], splits: bool) -> str:
    named = labels(rows)
    tables = ["\n".join(table(list(zip(named, rows, strict=True))))]
    if own := [(label, row["rates"]) for label, row in zip(named, rows, strict=True) if row.get("rates")]:
        tables.append("\n".join(table(own, {key: key for _, rates in own for key in rates})))
    names = dict.fromkeys(name for row in rows for name in row.get("by_split", {})) if splits else {}
    if len(names) == 1 and any("task" in row for row in rows):
        names = {}  # the only part of a benchmark is the whole
    for name in names:
        pairs = zip(named, rows, strict=True)
        chosen = [(label, row["by_split"][name]) for label, row in pairs if name in row.get("by_split", {})]
        tables.append("\n".join([f"**{name}**", "", *table(chosen)]))
    tables += [f"{row['name']}: not computed, because {row['not_computed']}" for row in rows if "not_computed" in row]
    return "\n\n".join(tables) + "\n"


def thinking_table(results: Mapping[str, Any], families: Mapping[str, str]) -> str:
    """One Markdown table of all tasks: thinking, answer and whole scored apart, as Think in Safety does.

    Args:
      results: see `read_results`.
      families: what each task probes; tasks of one family stand together, others are left out.
    """
    rows = [row for row in results["evaluations"] if row.get("task") in families]
    rows.sort(key=lambda row: (families[row["task"]], row["task"]))
    named = zip(labels(rows), rows, strict=True)
    cells = [(f"{families[row['task']]}: {row['task']}, {label}", row["thinking"]) for label, row in named]
    return "\n".join(table(cells, THINKING)) + "\n"


def check_baseline(path: str | Path, planned: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The baseline's evaluations that answer those planned: of the same benchmark, decoding and evaluator.

    Args:
      path: the baseline's `results.json`.
      planned: entries, or what `evaluate.identity` gives.

    Raises:
      ResultsError: there is none for one of them; says what the baseline has instead.
    """
    rows = read_results(path)["evaluations"]
    found = []
    for plan in planned:
        named = f"{plan.get('task', 'the records')} at {plan['decoding']}"
        same = [row for row in rows if row.get("benchmark") == plan["benchmark"]]
        if not same:
            raise ResultsError(
                f"{path} has no evaluation of {named} on these very questions; evaluate the baseline on them"
            )
        for key in ("decoding", "evaluator"):
            alike = [row for row in same if row.get(key) == plan[key]]
            if not alike:
                theirs = ", ".join(dict.fromkeys(json.dumps(row.get(key)) for row in same))
                raise ResultsError(
                    f"{path}: the baseline's {key} of {named} is {theirs}, here it is {json.dumps(plan[key])}; two arms are "
                    f"compared at one {key}: evaluate the baseline again"
                )
            same = alike
        found.append(same[-1])
    return found


def table(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Mapping[str, str] = COLUMNS) -> Iterator[str]:
    """Lines of a Markdown table of rates, a row for each (label, rates); `columns` are heads by key."""
    cells = [
        ["policy", *columns.values()],
        *([label, *(cell(row.get(key)) for key in columns)] for label, row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names and decodings; with step and benchmark where rows would else look the same."""
    found = [_label(row) for row in rows]
    for key in ("step", "evaluator", "benchmark"):
        same = [[row.get(key) for row, other in zip(rows, found, strict=True) if other == label] for label in found]
        found = [
            f"{label} {key} {row.get(key)}" if any(x != values[0] for x in values) else label
            for label, row, values in zip(found, rows, same, strict=True)
        ]
    return found


def _label(row: Mapping[str, Any]) -> str:
    # A vertical bar would end the table's cell.
    name = str(row["name"]).replace("|", "\\|")
    decoding = row.get("decoding") or {}
    if "temperature" not in decoding:
        return name
    temperature = decoding["temperature"]
    return f"{name} (greedy)" if temperature == 0 else f"{name} (T={temperature:g})"


def cell(rate: Mapping[str, Any] | float | None) -> str:
    """A rate in per cent with its interval, and what the evaluator could not tell."""
    if isinstance(rate, float):
        return f"{100 * rate:.1f}"
    if rate is None or rate["rate"] is None:
        return "–"
    text = f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    # What the evaluator could not tell widens what the numbers allow; say so beside them.
    return f"{text} ({100 * rate['unknown']:.1f} unknown)" if rate["unknown"] else text
