"""Evaluation of a policy: generate, judge, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax import distributed
from srpo_jax.data.items import Question
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.evaluation.generate import (
    GenerateConfig,
    Prompt,
    Response,
    encode_prompts,
    generate,
    require_responses,
)
from srpo_jax.evaluation.judging import benchmark_digest, check_failures, judge_responses
from srpo_jax.evaluation.metrics import by_prompt, report
from srpo_jax.evaluation.provenance import provenance
from srpo_jax.evaluation.samples import samples_name, write_samples
from srpo_jax.models.policy import Policy


def evaluate(
    policy: Policy,
    params: Mapping[str, Any],
    records: Sequence[Question],
    evaluator: Evaluator,
    config: GenerateConfig,
    folder: str | Path | None = None,
    *,
    name: str = "policy",
    step: int = 0,
    prompts: Sequence[Prompt] | None = None,
    training_judge: str | None = None,
    benchmark: Benchmark | None = None,
    plain: bool = False,
    score_only: bool = False,
    max_judge_failures: float = 0.01,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates `params` on questions: records and their harmless twins, or the items of a benchmark.

    Args:
      policy: whose module and processor to use.
      params: the parameters.
      records: the questions, with distinct ids.
      evaluator: who judges (see `evaluators.evaluator_for`).
      config: how to sample responses.
      folder: where responses, verdicts and samples are kept; the same call goes on where it was killed. None keeps nothing.
      name: of the row in the report.
      step: of training, for the report.
      prompts: `encode_prompts(records, policy.processor)`, to encode once for several policies.
      benchmark: that the questions are of, for its own rates.
      plain: whether a turn without tags is an answer without a path (see `judging.read_turn`).
      score_only: judge what `folder` holds, and sample nothing.
      max_judge_failures: share of responses on which the judge may fail; beyond it there is no result.
      training_judge: name of the judge that chose the policy's favourable branches, "" if there was none, None if not known.
      progress: show progress bars.

    Returns:
      An entry of `results.json` (see docs/evaluation.md).

    Raises:
      ValueError: no records, duplicate ids, prompts of other records, or prompts that do not fit the model.
      MissingResponsesError: `score_only`, and the folder lacks responses.
      JudgeFailureError: the judge failed too often.
    """
    if not records:
        raise ValueError("no records to evaluate")
    prompts = encode_prompts(records, policy.processor) if prompts is None else prompts
    if [p.record_id for p in prompts] != [r.id for r in records]:
        raise ValueError("the prompts are not those of the records; encode them again")
    if score_only:
        require_responses(params, prompts, config, folder)
    responses = generate(policy, params, prompts, config, folder, progress=progress)
    told = {"name": name, "step": step, **identity(records, evaluator, config, benchmark, plain=plain)}
    told["provenance"] = provenance(params, prompts, training_judge)
    judging: dict[str, Any] = {"plain": plain, "max_judge_failures": max_judge_failures, "progress": progress}
    return told | score(responses, records, evaluator, told, folder, benchmark=benchmark, **judging)


def score(
    responses: Sequence[Response],
    records: Sequence[Question],
    evaluator: Evaluator,
    row: Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    benchmark: Benchmark | None = None,
    plain: bool = False,
    max_judge_failures: float = 0.01,
    progress: bool = True,
) -> dict[str, Any]:
    """Judges responses, wherever they come from, and counts: what an entry of `results.json` holds beside `row`.

    Args:
      responses: to all of the questions.
      records: the questions.
      evaluator: who judges.
      row: what tells the entry from others (see `results.IDENTITY`); the samples are kept under it.
      folder, benchmark, plain, max_judge_failures, progress: see `evaluate`.

    Raises:
      JudgeFailureError: the judge failed too often.
    """
    judged = judge_responses(records, responses, evaluator, folder, plain=plain, progress=progress)
    told: dict[str, Any] = {"judge_failures": check_failures(judged, max_judge_failures)}
    if folder is not None and distributed.is_lead():
        write_samples(folder, samples_name(row), judged)
    if benchmark is not None:
        told["rates"] = benchmark.metrics(by_prompt(judged))
    # Rates of steps rest on the evaluator's word alone; labels of people calibrate them in the report.
    return told | {"uncalibrated": ["path"]} | report(judged)


def identity(
    records: Sequence[Question],
    evaluator: Evaluator,
    config: GenerateConfig,
    benchmark: Benchmark | None = None,
    *,
    plain: bool = False,
) -> dict[str, Any]:
    """What two evaluations must share to be compared, as it stands in an entry: task, benchmark, evaluator, decoding."""
    decoding = {**config.decoding(), "samples": config.samples, **({"plain": True} if plain else {})}
    task = {} if benchmark is None else {"task": benchmark.name}
    return {**task, "evaluator": evaluator.name, "decoding": decoding, "benchmark": benchmark_digest(records)}
