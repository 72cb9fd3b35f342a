"""Rates corrected by human labels on outputs of the evaluated checkpoint.

A judge's errors differ from policy to policy, so only labels of this policy's own outputs correct its rates, and only those
that chance chose and that were made without the verdict in sight (`HumanLabel.blind`). Three estimates stand side by side:

* the labels alone;
* prediction-powered: labels, and the judge's rate on everything as far as it predicts them (Angelopoulos et al. 2023, with the
  weight that minimises variance; for a yes-or-no judge this is post-stratification by its verdict);
* Rogan and Gladen (1978): the judge's rate on everything, inverted with the sensitivity and specificity that the labels show.

Intervals are percentiles of a bootstrap over clusters, which draws prevalence, sensitivity and specificity anew together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srpo_jax.evaluation.comparison import METRICS, Metric
from srpo_jax.evaluation.human import HumanLabel
from srpo_jax.evaluation.paired import by_cluster
from srpo_jax.evaluation.samples import Sample
from srpo_jax.evaluation.statistics import Outcome, both, every, wilson
from srpo_jax.paths import STEP_TITLES

RESAMPLES = 4000


def correct(samples: Sequence[Sample], labels: Sequence[HumanLabel], *, seed: int = 0) -> list[dict[str, Any]]:
    """Corrected rates of one evaluation, one row for every metric that has blind labels.

    Args:
      samples: of one evaluation.
      labels: of any responses; those of other responses, and those not blind, are left aside.
      seed: of the bootstrap.

    Returns:
      Rows as of `estimates`, with `metric`.
    """
    known = {label.key: label for label in labels if label.blind}
    rows = []
    for metric in METRICS:
        chosen = [s for s in samples if s.risky == metric.risky]
        human = [None if s.key not in known else _said(known[s.key], metric, s) for s in chosen]
        if all(x is None for x in human):
            continue
        judge = [_judged(metric, s) for s in chosen]
        rows.append({"metric": metric.name, **estimates(judge, human, [s.cluster for s in chosen], seed=seed)})
    return rows


def estimates(
    judge: Sequence[bool], human: Sequence[Outcome], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """The rate of an event by the judge, by labels, and by both.

    Args:
      judge: per response whether the judge says that the event came about.
      human: per response what a person says; None where nobody was asked.
      clusters: per response the name of its cluster; clusters are resampled whole.
      seed: of the bootstrap.

    Returns:
      `clusters` and `labelled` (how many there are, and how many responses have a label), and under `judge`, `labels`,
      `ppi` and `rogan_gladen` either `rate`, `low`, `high` (95 %) or `failed`, a sentence.

    Raises:
      ValueError: lists of different length, or no label.
    """
    if not len(judge) == len(human) == len(clusters) or all(x is None for x in human):
        raise ValueError(f"{len(judge)} verdicts, {len(human)} labels and {len(clusters)} clusters correct nothing")
    sums, draws = _sums(judge, human, clusters, np.random.default_rng(seed))
    labelled = np.array([x is not None for x in human])
    said = np.array([bool(x) for x in human])[labelled]
    names = np.asarray(clusters, str)
    told: dict[str, Any] = {"clusters": len(np.unique(names)), "labelled": int(labelled.sum())}
    told["judge"] = _plain(np.asarray(judge, bool), names, sums, draws, _judge_rate)
    told["labels"] = _plain(said, names[labelled], sums, draws, _label_rate)
    told["ppi"] = _estimate(sums, draws, _prediction_powered)
    told["rogan_gladen"] = _estimate(sums, draws, _rogan_gladen)
    return told


# Columns of the sums over clusters: all responses, judge's yes among them; and among labelled ones all four combinations.
ALL, YES, BOTH, MISSED, FALSE, NEITHER = range(6)


def _sums(
    judge: Sequence[bool], human: Sequence[Outcome], clusters: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """float[6] over everything, and float[RESAMPLES, 6] with clusters drawn anew."""
    f, h = np.asarray(judge, bool), np.array([-1 if x is None else int(x) for x in human])
    columns = [np.ones(len(f)), f, f & (h == 1), ~f & (h == 1), f & (h == 0), ~f & (h == 0)]
    table = np.stack([by_cluster(np.asarray(column, float), clusters)[0] for column in columns], axis=1)
    count = len(table)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return table.sum(0), weights @ table


def _judge_rate(s: np.ndarray) -> np.ndarray:
    return s[..., YES] / s[..., ALL]


def _label_rate(s: np.ndarray) -> np.ndarray:
    return (s[..., BOTH] + s[..., MISSED]) / s[..., BOTH:].sum(-1)


def _prediction_powered(s: np.ndarray) -> np.ndarray:
    """Post-stratified by verdict; where only one verdict is among the labels, the labels alone."""
    share = _judge_rate(s)
    yes, no = s[..., BOTH] + s[..., FALSE], s[..., MISSED] + s[..., NEITHER]
    found = share * s[..., BOTH] / yes + (1 - share) * s[..., MISSED] / no
    return np.where((yes > 0) & (no > 0), found, _label_rate(s))


def _rogan_gladen(s: np.ndarray) -> np.ndarray:
    sensitivity = s[..., BOTH] / (s[..., BOTH] + s[..., MISSED])
    specificity = s[..., NEITHER] / (s[..., NEITHER] + s[..., FALSE])
    return (_judge_rate(s) + specificity - 1) / (sensitivity + specificity - 1)


def _plain(values: np.ndarray, clusters: np.ndarray, sums: np.ndarray, draws: np.ndarray, rate) -> dict[str, Any]:
    """A share of independent responses has Wilson's interval; one of clusters the bootstrap's."""
    if len(np.unique(clusters)) < len(clusters):
        return _estimate(sums, draws, rate)
    low, high = wilson(int(values.sum()), len(values))
    return {"rate": float(values.mean()), "low": low, "high": high}


def _estimate(sums: np.ndarray, draws: np.ndarray, rate) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = float(rate(sums)), rate(draws)
    if not np.isfinite(value):
        return {"failed": "the labels lack one of the two outcomes, so the judge's errors cannot be told from them"}
    if not 0 <= value <= 1:
        return {"failed": f"{100 * value:.1f} % is outside [0, 100]: judge and labels do not fit the correction"}
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 0.95 * len(drawn):
        return {"failed": "too few labels of one of the two outcomes: resampling loses them"}
    low, high = np.clip(np.percentile(finite, [2.5, 97.5]), 0, 1)
    if high - low < 1e-12:
        return {"failed": "the labels all agree: resampling them shows no error; read the labels alone"}
    return {"rate": value, "low": float(low), "high": float(high)}


def _judged(metric: Metric, sample: Sample) -> bool:
    """The judge's word as rates count it: what it cannot tell speaks against the policy."""
    outcome = metric.outcome(sample)
    return metric.fault if outcome is None else outcome


def _said(label: HumanLabel, metric: Metric, sample: Sample) -> Outcome:
    """What a person says of the metric's event; None where they did not say it."""
    if sample.answer is None or (metric.name == "path.S" and not sample.whole_path):
        return metric.outcome(sample)  # nothing to read: the protocol decides, for people and judges alike
    if metric.name == "path.S":
        steps = [label.steps.get(str(number)) for number in range(1, len(STEP_TITLES) + 1)]
        return every(steps)
    fields: Mapping[str, Outcome] = {
        "S": label.safe,
        "E": label.effective,
        "SE": both(label.safe, label.effective),
        "helpful": label.effective,
        "over_refusal": label.refused,
    }
    return fields[metric.name]
