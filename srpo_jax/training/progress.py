"""How fast a run is: a line per update for people, `performance.jsonl` and TensorBoard for machines."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from srpo_jax import distributed, observe
from srpo_jax.flops import chip_of
from srpo_jax.training.workdir import MetricsLog, NoLog

PARTS = ("explore", "judge", "data", "update", "save")


@dataclasses.dataclass(frozen=True)
class Profile:
    """A trace of one update for TensorBoard's profiler or Perfetto.

    Attributes:
      step: the update that makes this step.
      folder: where it is written, by every process.
    """

    step: int
    folder: Path

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Traces what is inside if `step` is the one wanted."""
        if step != self.step:
            yield
            return
        with jax.profiler.trace(str(self.folder)):
            yield


class Progress:
    """Times updates, from construction on.

    Args:
      log: where times go; they stay out of `metrics.jsonl`, which is a function of the run.
      stop: the last update.
    """

    def __init__(self, log: MetricsLog | NoLog, stop: int):
        self._log, self._stop, self._last = log, stop, time.perf_counter()
        observe.take()

    def step(self, step: int, metrics: Mapping[str, float], counters: Mapping[str, float]) -> None:
        """Tells of the update that makes `step`: what it cost since the one before, by part.

        Args:
          step: updates done.
          metrics: `loss` and whatever is worth a glance.
          counters: `tokens` without padding, and `flops` on them (see `srpo_jax.flops`).
        """
        values = measured(observe.take(), time.perf_counter() - self._last, counters)
        self._last = time.perf_counter()
        self._log.write_times(step, values)
        if distributed.is_lead():
            print(self._line(step, metrics, values), file=sys.stderr, flush=True)

    def _line(self, step: int, metrics: Mapping[str, float], values: Mapping[str, Any]) -> str:
        told = {"reference": "reference_loss"} | ({"contrastive": "contrastive_loss"} if metrics.get("pairs") else {})
        terms = [
            f"{name} {metrics[key]:.4f}" for name, key in told.items() if key in metrics
        ]  # not every objective has both
        loss = f"loss {metrics['loss']:.4f}" + (f" ({', '.join(terms)})" if terms else "")
        shares = (f"{part} {values[part] / values['seconds']:.0%}" for part in PARTS if values.get(part, 0) > 0)
        left = (self._stop - step) * (values["data"] + values["update"])
        parts = [f"update {step}/{self._stop}", loss, f"{values['seconds']:.2f} s ({', '.join(shares)})"]
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        parts += [f"MFU {values['mfu']:.1%}"] if "mfu" in values else []
        parts += [f"peak {values['peak_memory'] / 2**30:.1f} GiB"] if "peak_memory" in values else []
        parts += [f"{values['compilations']:.0f} compilations {values['compile']:.0f} s"] if "compile" in values else []
        return "  ".join([*parts, f"{left // 60:.0f} min {left % 60:.0f} s left"])


def measured(spans: Mapping[str, float], seconds: float, counters: Mapping[str, float]) -> dict[str, float]:
    """Spans, rates and memory of an update; `tokens_per_second` and `mfu` are of its data and update alone.

    `mfu` is the share of the devices' peak that the model's operations on unique tokens make, absent for devices of which no
    peak is known; `occupancy` the share of places in decoding that drew a token of a branch, where there was exploration.
    """
    spans = dict(spans)
    places, tokens = spans.pop("decode_places", 0.0), spans.pop("decoded_tokens", 0.0)
    busy = spans.get("data", 0.0) + spans.get("update", 0.0)
    values = {"data": 0.0, "update": 0.0, **spans, "seconds": seconds}
    values["tokens_per_second"] = counters["tokens"] / max(busy, 1e-9)
    values["flops_per_second"] = counters["flops"] / max(busy, 1e-9)
    if places:
        values["occupancy"] = tokens / places
    if chip := chip_of(jax.devices()[0].device_kind):
        values["mfu"] = values["flops_per_second"] / (chip.flops * jax.device_count())
    if peak := observe.peak_memory():
        values["peak_memory"] = peak
    return values
