"""What a process spends its time and memory on. Nothing here changes a result."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"

_spans: dict[str, float] = defaultdict(float)


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Counts the seconds inside as those of `name`. Spans within one another count twice: choose names that do not nest."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _spans[name] += time.perf_counter() - begin


def count(name: str, value: float) -> None:
    """Adds `value` to what is known of `name`."""
    _spans[name] += value


def take() -> dict[str, float]:
    """Seconds and counts by name since the last call; "compile" and "compilations" are XLA's, within other spans."""
    taken = dict(_spans)
    _spans.clear()
    return taken


def peak_memory() -> int | None:
    """Bytes at the highest point so far on the first device of this process; None where the platform does not tell (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
        _spans["compile"] += duration_secs
        _spans["compilations"] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
