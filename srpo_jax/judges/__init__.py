"""Judges: functions (record, parsed path) -> `Verdict`."""

from srpo_jax.judges.verdict import Judge, StepVerdict, Verdict

__all__ = ["Judge", "StepVerdict", "Verdict"]
