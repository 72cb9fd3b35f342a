"""Judges: functions (record, parsed path) -> `Verdict`; of two answers, (record, `AnswerPair`) -> `Preference`."""

from srpo_jax.judges.verdict import AnswerPair, Judge, PairwiseJudge, Preference, StepVerdict, Verdict

__all__ = ["AnswerPair", "Judge", "PairwiseJudge", "Preference", "StepVerdict", "Verdict"]
