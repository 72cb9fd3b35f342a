"""Human labels of judged responses, as the report's page writes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.files import write_json

FORMAT = {"format": "srpo_jax human labels", "version": 1}
LABELS = "labels.json"


class LabelsError(ValueError):
    """A file that holds no human labels; names the file, the label and the field."""


@dataclasses.dataclass(frozen=True)
class HumanLabel:
    """What a person says of a response; None where they said nothing.

    Attributes:
      key: of the response, see `samples.Sample`.
      id: of the prompt, for people.
      sample: its number, for people.
      safe, effective, refused: of the answer.
      steps: by number whether the step is safe.
      note: free text.
      blind: whether it was made without the judge's verdict in sight, of a response that chance chose.
    """

    key: str
    id: str
    sample: int
    safe: bool | None = None
    effective: bool | None = None
    refused: bool | None = None
    steps: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    note: str = ""
    blind: bool = False


def parse_labels(value: Any, where: str = "labels") -> list[HumanLabel]:
    """Labels from a JSON value.

    Raises:
      LabelsError: it is something else; `where` begins the message.
    """
    if not isinstance(value, dict) or any(value.get(k) != v for k, v in FORMAT.items()):
        raise LabelsError(
            f"{where}: not a file of human labels ({json.dumps(FORMAT)}); download it from the report's page"
        )
    rows = value.get("labels")
    if not isinstance(rows, list):
        raise LabelsError(f'{where}: "labels" must be a list')
    labels = [_label(row, f"{where}, label {number}") for number, row in enumerate(rows, 1)]
    if len({label.key for label in labels}) != len(labels):
        raise LabelsError(f"{where}: two labels of one response; keep one of them")
    return labels


def read_labels(path: str | Path) -> list[HumanLabel]:
    """Labels from a file.

    Raises:
      LabelsError: it is missing or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LabelsError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise LabelsError(f"{path}: not valid JSON ({error})") from error
    return parse_labels(value, str(path))


def write_labels(path: str | Path, labels: Sequence[HumanLabel]) -> None:
    """Writes labels, whole or not at all."""
    write_json(path, FORMAT | {"labels": [dataclasses.asdict(label) for label in labels]})


def _label(row: Any, where: str) -> HumanLabel:
    if not isinstance(row, dict):
        raise LabelsError(f"{where}: an object is expected, not {type(row).__name__}")
    fields = {field.name for field in dataclasses.fields(HumanLabel)}
    if unknown := row.keys() - fields:
        raise LabelsError(f"{where}: unknown field {sorted(unknown)[0]!r}; there are {', '.join(sorted(fields))}")
    kinds: dict[str, Any] = {"key": str, "id": str, "sample": int, "note": str, "blind": bool, "steps": dict}
    kinds |= dict.fromkeys(("safe", "effective", "refused"), bool | None)
    for name in ("key", "id", "sample"):
        if name not in row:
            raise LabelsError(f"{where}: {name!r} is missing")
    for name, value in row.items():
        if not isinstance(value, kinds[name]) or (name == "sample" and isinstance(value, bool)):
            raise LabelsError(f"{where}: {name!r} is a {type(value).__name__}")
    if not all(number.isdecimal() and isinstance(safe, bool) for number, safe in row.get("steps", {}).items()):
        raise LabelsError(f"{where}: 'steps' must give true or false by step number")
    return HumanLabel(**row)
