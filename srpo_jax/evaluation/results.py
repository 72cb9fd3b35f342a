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

IDENTITY = ("name", "step", "decoding", "benchmark")
"""What tells rows apart."""


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
    """Adds an evaluation to `results.json`, or replaces that of the same name, step, decoding and benchmark in its place.

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
    if mine in what:
        rows[what.index(mine)] = dict(row)
    else:
        rows.append(dict(row))


def render(results: Mapping[str, Any], *, splits: bool = True) -> str:
    """Markdown tables that also read well as text: all prompts, then one table per split.

    Rows are evaluations in order, then the reference policies; cells are percentages with their 95 % interval.
    """
    rows = [*results["evaluations"], *results.get("references", [])]
    named = labels(rows)
    tables = ["\n".join(_table(list(zip(named, rows, strict=True))))]
    names = dict.fromkeys(name for row in rows for name in row.get("by_split", {})) if splits else {}
    for name in names:
        pairs = zip(named, rows, strict=True)
        chosen = [(label, row["by_split"][name]) for label, row in pairs if name in row.get("by_split", {})]
        tables.append("\n".join([f"**{name}**", "", *_table(chosen)]))
    return "\n\n".join(tables) + "\n"


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    cells = [
        ["policy", *COLUMNS.values()],
        *([label, *(_cell(row.get(key)) for key in COLUMNS)] for label, row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names and decodings; with step and benchmark where rows would else look the same."""
    found = [_label(row) for row in rows]
    for key in ("step", "benchmark"):
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


def _cell(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["rate"] is None:
        return "–"
    text = f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    # What the evaluator could not tell widens what the numbers allow; say so beside them.
    return f"{text} ({100 * rate['unknown']:.1f} unknown)" if rate["unknown"] else text
