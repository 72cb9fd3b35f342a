"""How far two blind reviewers agree: Cohen's kappa with its interval."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa

from srpo_jax.data.review.decisions import Status
from srpo_jax.data.review.session import Review

LABELS = tuple(Status)


def agreement(review: Review) -> dict[str, Any]:
    """Agreement on the records that two reviewers decided without seeing each other's decision.

    Returns:
      "n": records; "keep": agreement on keeping or not; "status": on the four statuses, with "table", whose rows are the
      decisions of the reviewer whose name comes first. Each of the two has "agreed" (share), "kappa", "low" and "high" (95 %,
      asymptotic), None where kappa is undefined, because a reviewer gave all records one label or there is none.
    """
    table = np.zeros((len(LABELS), len(LABELS)), int)
    for index in range(len(review.records)):
        made = sorted(review.decided(index), key=lambda one: one.reviewer)
        if len(made) >= max(2, review.needed(index)):
            table[LABELS.index(made[0].status), LABELS.index(made[1].status)] += 1
    kept = np.array([[label.kept, not label.kept] for label in LABELS], int)
    told = {"labels": [str(label) for label in LABELS], "table": table.tolist()}
    return {"n": int(table.sum()), "keep": _kappa(kept.T @ table @ kept), "status": _kappa(table) | told}


def _kappa(table: np.ndarray) -> dict[str, float | None]:
    n = table.sum()
    agreed = float(np.trace(table) / n) if n else None
    used = (table.sum(0) + table.sum(1)) > 0  # statsmodels divides by the marginals
    if n == 0 or (table.sum(0) > 0).sum() < 2 or (table.sum(1) > 0).sum() < 2:
        return {"agreed": agreed, "kappa": None, "low": None, "high": None}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = cohens_kappa(table[np.ix_(used, used)])
    low, high = (float(x) if math.isfinite(x) else None for x in (found.kappa_low, found.kappa_upp))
    return {"agreed": agreed, "kappa": float(found.kappa), "low": low, "high": high}
