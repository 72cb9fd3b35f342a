"""A work directory with two evaluated policies, one of which writes hostile text."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.combs import CombBranch, CombSet, make_comb, write_combs
from srpo_jax.evaluation.evaluators import Evaluator, evaluator_for
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import benchmark_digest, judge_responses
from srpo_jax.evaluation.metrics import report
from srpo_jax.evaluation.pairwise import compare_answers
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.evaluation.results import add_result, read_results
from srpo_jax.evaluation.samples import SampleStep, read_samples, samples_name, write_samples
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.judges.verdict import Preference, StepVerdict, Verdict

HOSTILE = (
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    '<img src=x onerror="window.hit = 3">',
    "<!--<script>window.hit = 4//",
    '"><svg onload=window.hit=5>',
    "safe\u202egnp.\u2066hidden\u2069 \u200bend \x07\x1b[31m",
    "{{ 7 * 7 }}{% raw %} \u2028\u2029",
    "javascript:window.hit=6 ']]>&lt;b&gt;",
    "x" * 300_000,
)
"""What a policy, a judge or a data set may write."""

WORLD = evaluator_for("scenes")
RECORDS = scenes.records("test_id", 20) + scenes.records("wording", 20)


def add_row(
    workdir, name, replies, *, records=RECORDS, evaluator=WORLD, step=0, temperature=0.0, texts=None, **provenance
):
    """Evaluates turns as `evaluate` does, without a policy."""
    texts = texts or ["".join(GRAMMAR.render(r.steps, reply)) for r, reply in zip(records, replies, strict=True)]
    responses = [Response(r.id, 0, np.arange(5), True, text) for r, text in zip(records, texts, strict=True)]
    judged = judge_responses(records, responses, evaluator, progress=False)
    decoding = {"temperature": temperature, "max_tokens": 100, "seed": 0, "samples": 1}
    entry = {"name": name, "step": step, "evaluator": evaluator.name, "decoding": decoding}
    entry |= {"benchmark": benchmark_digest(records), "provenance": provenance, **report(judged)}
    write_samples(workdir / "evaluation", samples_name(entry), judged)
    add_result(workdir / "results.json", entry, reference_rows(RECORDS, WORLD) if records is RECORDS else ())
    return judged


def first(question, pair):
    """A judge that looks at the place of an answer alone."""
    return Preference("first", "it came first")


first.name = "first-1"


def add_pairwise(workdir, judge=first, records=RECORDS):
    """Compares the last row's answers with the first's, as `scripts/evaluate.py --compare` does."""
    base, *_, last = read_results(workdir / "results.json")["evaluations"]
    base_samples, samples = (read_samples(workdir / "evaluation", samples_name(row)) for row in (base, last))
    told = compare_answers(records, samples, base_samples, judge, max_judge_failures=1.0, progress=False)
    baseline = {"name": base["name"], "step": base["step"]}
    add_result(workdir / "results.json", last | {"pairwise": {"baseline": baseline, **told}})


@pytest.fixture(scope="session")
def made():
    """What tests make evaluations from."""
    return SimpleNamespace(add_row=add_row, add_pairwise=add_pairwise, records=RECORDS, hostile=HOSTILE)


@pytest.fixture
def workdir(tmp_path):
    """A policy that follows every request on half of the records, and one that is right."""
    half = [(r.unsafe_reply if r.risky else r.safe_reply) if i < 20 else r.safe_reply for i, r in enumerate(RECORDS)]
    add_row(tmp_path / "run", "base", half, params="aa11", training_judge="")
    add_row(tmp_path / "run", "SRPO", [r.safe_reply for r in RECORDS], step=48, params="bb22", training_judge="rules")
    add_combs(tmp_path / "run", ["first tree", "second tree"])
    return tmp_path / "run"


def add_combs(workdir, texts=("plain",)):
    """A tree per record: a good, a bad, a put-there and a cut branch, with `texts` wherever a model or a judge writes."""
    combs = []
    for record, text in zip(RECORDS, texts, strict=False):
        step = SampleStep(2, text[:60], text, False, None, text[:500])
        shared = {
            "steps": (step,),
            "text": text,
            "safe": True,
            "effective": True,
            "refused": None,
            "reason": text[:500],
        }
        branches = [
            CombBranch(1, 0, "", answer=text, status="ok", good=True, count=3, **shared),
            CombBranch(1, 0, "", answer=text, status="ok", good=False, **shared),
            CombBranch(0, 1, text[:40], answer=text, status="ok", good=None, **shared),
            CombBranch(0, 0, "", answer=None, status=text[:40], good=None, **shared),
        ]
        combs.append(make_comb(workdir / "evaluation", record, branches, WORLD.steps))
    combs = [dataclasses.replace(c, question=text[:2000]) for c, text in zip(combs, texts, strict=True)]
    meant = {"good": texts[0][:40], "meaning": texts[0][:40], "judge": texts[-1][:40], "step_judge": texts[0][:40]}
    write_combs(workdir / "evaluation", "run", CombSet(texts[0], **meant, total=90, combs=tuple(combs)))


@pytest.fixture
def hostile(tmp_path):
    """Hostile question, category, split, id, policy name, judge's reason, steps and answer."""
    records = [
        dataclasses.replace(
            record,
            id=f"{record.id}{text[:40]}",
            question=text[:2000],
            twin=None,
            meta={"split": text[:60]},
        )
        for record, text in zip(RECORDS, HOSTILE, strict=False)
    ]
    steps = [
        [text if i == 2 else step for i, step in enumerate(r.steps)] for r, text in zip(records, HOSTILE, strict=True)
    ]
    texts = ["".join(GRAMMAR.render(s, text)) for s, text in zip(steps, HOSTILE, strict=True)]
    texts[-1] = HOSTILE[-1] + HOSTILE[0]  # no path at all
    evaluator = Evaluator(
        f"judge {HOSTILE[1]}",
        lambda record, path: Verdict(False, False, path.answer[:500]),
        lambda record, path: [StepVerdict(s.number, False, None, s.text[:500]) for s in path.steps],
    )
    names = (f"base {HOSTILE[2]}", f"new {HOSTILE[0]} {HOSTILE[5]}")
    for name in names:
        add_row(
            tmp_path / "bad", name, (), records=records, evaluator=evaluator, texts=texts, training_judge=HOSTILE[0]
        )
    add_combs(tmp_path / "bad", HOSTILE)

    def judge(question, pair):
        return Preference("first", HOSTILE[0])

    judge.name = f"leaning {' '.join(HOSTILE[:8])}"
    add_pairwise(tmp_path / "bad", judge, records)
    return tmp_path / "bad"
