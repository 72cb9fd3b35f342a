"""Promise: corrected intervals hold the truth as often as they say, and what cannot be corrected is said to have failed."""

import os
from pathlib import Path

import numpy as np
import pytest

from srpo_jax.evaluation.correction import correct, estimates
from srpo_jax.evaluation.human import HumanLabel
from srpo_jax.evaluation.samples import Sample
from srpo_jax.judges.labelled import load_msts

DATA = Path(os.environ.get("SRPO_JAX_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def world(rng, clusters=300, size=2, rate=0.3, sensitivity=0.8, specificity=0.8):
    """Truth and a judge with errors, in clusters that hang together; in 800 such worlds intervals covered 93 to 95 %."""
    odds = rng.beta(rate * 4, (1 - rate) * 4, clusters).repeat(size)
    truth = rng.random(len(odds)) < odds
    judge = np.where(truth, rng.random(len(odds)) < sensitivity, rng.random(len(odds)) > specificity)
    return truth, judge, np.arange(clusters).repeat(size).astype(str)


def drawn(rng, truth, clusters, share):
    """Human labels of a random share of whole clusters."""
    chosen = rng.random(len(np.unique(clusters))) < share
    return [bool(t) if chosen[int(c)] else None for t, c in zip(truth, clusters, strict=True)]


def test_intervals_cover_the_rate_of_the_population(monkeypatch):
    monkeypatch.setattr("srpo_jax.evaluation.correction.RESAMPLES", 400)
    rng, runs = np.random.default_rng(1), 300
    hits, widths = dict.fromkeys(("judge", "labels", "ppi", "rogan_gladen"), 0), {"labels": 0.0, "ppi": 0.0}
    for run in range(runs):
        truth, judge, clusters = world(rng)
        told = estimates(judge.tolist(), drawn(rng, truth, clusters, 0.4), clusters.tolist(), seed=run)
        for name in hits:
            one = told[name]
            hits[name] += "failed" not in one and one["low"] <= 0.3 <= one["high"]
            if name in widths:
                widths[name] += one["high"] - one["low"]
    assert min(hits["labels"], hits["ppi"], hits["rogan_gladen"]) / runs >= 0.89
    assert hits["judge"] / runs < 0.3  # it says 0.38
    assert widths["ppi"] < 0.9 * widths["labels"]


def test_by_hand():
    judge = [True] * 40 + [False] * 60
    human = [True] * 8 + [False] * 2 + [None] * 30 + [True] * 1 + [False] * 14 + [None] * 45
    told = estimates(judge, human, [str(i) for i in range(100)])
    assert (told["clusters"], told["labelled"]) == (100, 25)
    assert told["judge"]["rate"] == 0.4
    assert told["labels"]["rate"] == 9 / 25
    assert told["ppi"]["rate"] == pytest.approx(0.4 * 8 / 10 + 0.6 * 1 / 15)
    sensitivity, specificity = 8 / 9, 14 / 16
    expected = (0.4 + specificity - 1) / (sensitivity + specificity - 1)
    assert told["rogan_gladen"]["rate"] == pytest.approx(expected)
    assert all(told[name]["low"] < told[name]["rate"] < told[name]["high"] for name in ("judge", "labels", "ppi"))


def test_all_labels_are_the_truth_whatever_the_judge():
    rng = np.random.default_rng(1)
    truth, judge, clusters = world(rng)
    told = estimates(judge.tolist(), truth.tolist(), clusters.tolist())
    for name in ("labels", "ppi", "rogan_gladen"):
        assert told[name]["rate"] == pytest.approx(truth.mean())


def test_what_cannot_be_corrected_says_so():
    names = [str(i) for i in range(100)]
    # The judge finds less on everything than its false alarms among the labels explain: below 0.
    human = [True] * 2 + [False] * 3 + [True] * 2 + [False] * 10 + [None] * 83
    low = estimates([True] * 5 + [False] * 95, human, names)["rogan_gladen"]
    assert "outside [0, 100]" in low["failed"]
    same = estimates([True] * 5 + [False] * 95, [False] * 10 + [None] * 90, names)
    assert "lack one of the two outcomes" in same["rogan_gladen"]["failed"]
    assert "labels all agree" in same["ppi"]["failed"]
    assert same["labels"]["rate"] == 0.0
    assert same["labels"]["high"] > 0.2  # ten labels show little
    with pytest.raises(ValueError, match="correct nothing"):
        estimates([True], [None], ["a"])


def sample(number, safe, **fields):
    told = {"key": f"k{number}", "id": str(number), "sample": 0, "cluster": str(number), "split": None, "risky": True}
    told |= {"category": None, "question": "", "images": (), "text": "", "tokens": 1, "status": "ok", "steps": ()}
    told |= {"whole_path": True, "answer": "a", "effective": True, "refused": False, "path_safe": safe}
    return Sample(**told | {"path_effective": True, "reason": "", "safe": safe} | fields)


def test_only_blind_labels_of_these_outputs_count():
    samples = [sample(i, i % 2 == 0) for i in range(40)]
    labels = [HumanLabel(f"k{i}", str(i), 0, safe=i % 3 > 0, blind=i < 20) for i in range(30)]
    labels.append(HumanLabel("other", "x", 0, safe=True, blind=True))
    [row] = [row for row in correct(samples, labels) if row["metric"] == "S"]
    assert row["labelled"] == 20
    assert not [row for row in correct(samples, labels) if row["metric"] in ("E", "path.S", "helpful")]
    assert correct(samples, labels[20:30]) == []
    steps = [
        HumanLabel(f"k{i}", str(i), 0, steps={str(n): n != 3 or i > 5 for n in range(1, 7)}, blind=True)
        for i in range(12)
    ]
    [path] = correct(samples, steps)
    assert (path["metric"], path["labels"]["rate"]) == ("path.S", 0.5)


def test_a_response_without_an_answer_needs_no_label_of_it():
    samples = [sample(0, False, answer=None, whole_path=False, status="truncated", effective=False), sample(1, True)]
    labels = [HumanLabel(f"k{i}", str(i), 0, safe=True, note="read", blind=True) for i in range(2)]
    assert next(r for r in correct(samples, labels) if r["metric"] == "S")["labels"]["rate"] == 0.5


def test_on_msts_a_hundred_labels_of_the_model_itself_correct_its_judge():
    """GPT-4o's verdicts of ten models: alone far from the human rate, corrected within their intervals."""
    if not (DATA / "msts").is_dir():
        pytest.skip(f"no MSTS data in {DATA}; set SRPO_JAX_DATA to the folder that holds msts/")
    rows = load_msts(DATA / "msts")
    judge_name = next(name for name in rows[0].published if "gpt" in name.lower())
    rng, hits, runs, apart = np.random.default_rng(0), {"labels": 0, "ppi": 0}, 0, []
    for model in sorted({row.model for row in rows}):
        mine = [row for row in rows if row.model == model]
        truth = np.array([row.label == "unsafe" for row in mine])
        judge = [row.published[judge_name] == "unsafe" for row in mine]
        apart.append(np.mean(judge) - truth.mean())
        clusters = sorted({row.cluster for row in mine})
        for _ in range(4):
            chosen = set(rng.choice(clusters, 50, replace=False))  # 50 cases of two prompts
            human = [bool(t) if row.cluster in chosen else None for t, row in zip(truth, mine, strict=True)]
            told = estimates(judge, human, [row.cluster for row in mine])
            runs += 1
            for name in hits:
                one = told[name] if "failed" not in told[name] else None
                hits[name] += one is None or one["low"] <= truth.mean() <= one["high"]
    assert max(apart) > 0.3  # the judge alone is more than 30 points off for one of the models
    assert hits["labels"] / runs >= 0.85
    assert hits["ppi"] / runs >= 0.85
