"""A judge's settings from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_settings(path: str | Path, known: Iterable[str], needed: str, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the file's fields.

    Args:
      path: a JSON object.
      known: the fields that it may have.
      needed: the one that it must have.
      make: from the fields; raises TypeError or ValueError for values that cannot be used.

    Raises:
      ValueError: not a JSON object, an unknown or missing field, or a value that is refused; names file and field.
    """
    known = set(known)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.keys() - known or needed not in values:
            raise ValueError(f"give a JSON object with {needed} and any of {', '.join(sorted(known))}")
        return make(values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
