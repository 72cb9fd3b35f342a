"""What the question alone, or the picture alone, gives away of whether a record is risky.

In SSUI data the risk lies in the two together. A classifier that reads one of them only should therefore be no better than
chance; if it is better, so can a model be that never looks at the other, and what is measured is less than is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from flax import nnx
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from srpo_jax.inputs import Inputs
from srpo_jax.models.policy import Policy

FOLDS = 5
FEWEST = 20
"""Clusters of each class, below which there is nothing to measure."""


def text_reader(seed: int = 0) -> Any:
    """An untrained classifier of texts: words, pairs of words and pieces of words, weighted by TF-IDF; logistic regression."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    return make_pipeline(make_union(words, pieces), LogisticRegression(C=10.0, max_iter=1000, random_state=seed))


def pixel_reader(seed: int = 0) -> Any:
    """An untrained classifier of `pixel_features`: extremely randomised trees, which see colours, places and sizes."""
    return ExtraTreesClassifier(300, min_samples_leaf=2, random_state=seed)


def tower_reader(seed: int = 0) -> Any:
    """An untrained classifier of `tower_features`: logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, random_state=seed))


def pixel_features(picture: PIL.Image.Image) -> np.ndarray:
    """float32[506]: an RGB picture at 12 × 12, 24 bins of each colour, width and height."""
    small = np.asarray(picture.resize((12, 12), PIL.Image.Resampling.BOX), np.float32).ravel() / 255
    counts = np.asarray(picture.histogram(), np.float32).reshape(3, 256)
    bins = np.add.reduceat(counts, np.linspace(0, 256, 25, dtype=int)[:-1], axis=1) / (picture.width * picture.height)
    return np.concatenate([small, bins.ravel(), np.asarray(picture.size, np.float32)])


def tower_features(policy: Policy, pictures: Sequence[Sequence[PIL.Image.Image]], batch: int = 8) -> np.ndarray:
    """float32[n, D]: for each record, the mean of what the vision tower of a policy makes of its pictures.

    Args:
      policy: any checkpoint; its language model is not used.
      pictures: of each record, at least one.
      batch: records at a time.
    """

    @jax.jit
    def pooled(params: Any, inputs: Inputs) -> jax.Array:
        features = nnx.merge(policy.graphdef, params).encode_images(inputs.vision)
        slots = inputs.image_slots[..., None]
        merged = jax.numpy.take_along_axis(features, jax.numpy.maximum(slots, 0), axis=1)
        return jax.numpy.where(slots >= 0, merged, 0).sum(1) / (slots >= 0).sum(1)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(pictures), batch):
            part = list(pictures[start : start + batch])
            part += part[:1] * (batch - len(part))  # one compiled shape for the last batch, too
            inputs = policy.encode({"images": list(images), "question": "-"} for images in part)
            yield np.asarray(pooled(policy.params, inputs), np.float32)

    return np.concatenate(list(batches()))[: len(pictures)]


def leak(
    reader: Callable[[int], Any],
    inputs: Any,
    risky: Sequence[bool],
    clusters: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """How well a reader of `inputs` tells risky records from harmless ones that it was not trained on.

    Five-fold cross-validation in which clusters stay whole, so that a twin never gives away its twin. Intervals are 95 %
    percentiles of a bootstrap over clusters, of the scores as they came (the reader is not trained anew). Where classes are
    balanced within what the reader sees, an AUC below 0.5 is usual: what is left out is opposite to what is left in.

    Args:
      reader: makes an untrained classifier from a seed, such as `text_reader`.
      inputs: n texts, or float[n, features].
      risky: n labels.
      clusters: n names; see `Record.cluster`.
      seed: of folds, reader and bootstrap.
      resamples: of the bootstrap.

    Returns:
      "n", "clusters", "verdict": "leak" if the interval of the AUC lies above 0.5, "none found", or "not measured" with a
      "reason"; if measured, "auc" and "accuracy" (balanced, at the threshold 0.5), each {"value", "low", "high"}, and "told":
      the places of the records that were given away most clearly, at most eight.
    """
    labels, names = np.asarray(risky, bool), np.asarray(clusters)
    counts = {"n": len(labels), "clusters": len(set(clusters))}
    few = [len(set(names[labels == kind])) for kind in (True, False)]
    if min(few) < FEWEST:
        reason = f"{few[0]} clusters with risky and {few[1]} with harmless records; it takes {FEWEST} of each"
        return counts | {"verdict": "not measured", "reason": reason}
    inputs = np.asarray(inputs, object) if isinstance(inputs[0], str) else np.asarray(inputs)
    scores = np.full(len(labels), np.nan)
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(inputs, labels, names):
        model = reader(seed).fit(inputs[train], labels[train])
        scores[test] = model.predict_proba(inputs[test])[:, list(model.classes_).index(True)]
    _, cluster = np.unique(names, return_inverse=True)
    auc, accuracy = _with_interval(scores, labels, cluster, np.random.default_rng(seed), resamples)
    right = np.where(labels, scores, 1 - scores)
    told = [int(i) for i in np.argsort(-right, kind="stable")[:8] if right[i] > 0.5]
    return counts | {
        "verdict": "leak" if auc["low"] > 0.5 else "none found",
        "auc": auc,
        "accuracy": accuracy,
        "told": told,
    }


def _with_interval(
    scores: np.ndarray, labels: np.ndarray, cluster: np.ndarray, rng: np.random.Generator, resamples: int
) -> list[dict[str, float]]:
    """AUC and balanced accuracy; a resample is a weight for each cluster."""
    found = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(0, cluster.max() + 1, cluster.max() + 1), minlength=cluster.max() + 1)
        weights = drawn[cluster].astype(float)
        if weights[labels].sum() and weights[~labels].sum():
            found.append((weighted_auc(scores, labels, weights), _balanced(scores, labels, weights)))
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    ones = np.ones(len(labels))
    values = weighted_auc(scores, labels, ones), _balanced(scores, labels, ones)
    return [{"value": float(v), "low": float(a), "high": float(b)} for v, a, b in zip(values, low, high, strict=True)]


def weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The area under the ROC curve, ties by half: scikit-learn's `roc_auc_score`, without its checks of every resample."""
    _, place = np.unique(scores, return_inverse=True)
    yes, no = np.bincount(place, weights * labels), np.bincount(place, weights * ~labels)
    return float(yes @ (np.cumsum(no) - no / 2) / (yes.sum() * no.sum()))


def _balanced(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    hits = (scores > 0.5) == labels
    return float(np.mean([np.average(hits[labels == kind], weights=weights[labels == kind]) for kind in (True, False)]))
