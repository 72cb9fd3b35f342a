"""What an evaluation asks, task by task: the questions, who judges, and where the questions come from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from srpo_jax.data.items import Question
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.registry import BENCHMARKS, RSBENCH, resolve
from srpo_jax.evaluation.evaluators import Evaluator

Q = TypeVar("Q", bound=Question)


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions and their evaluator.

    Attributes:
      questions: records, or items of a benchmark (`data.items.Question`).
      evaluator: who judges.
      benchmark: that the items are of; None for records.
      data: where the questions come from, for `results.json`.
    """

    questions: Sequence[Any]
    evaluator: Evaluator
    benchmark: Benchmark | None
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where published benchmarks are read from.

    Attributes:
      root: the folder of all benchmarks.
      fields: per benchmark, published field name to that of the copy.
      partial: accept incomplete copies (see `Benchmark.load`).
      hub: read those that can be from the Hugging Face hub.
      limit: questions per task, chosen by a digest of their cluster; None for all.
    """

    root: str | Path = "data"
    fields: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    partial: bool = False
    hub: bool = False
    limit: int | None = None


def build_tasks(
    section: ml_collections.ConfigDict,
    options: DataOptions,
    difficulty: Difficulty | None = None,
    folder: str | Path | None = None,
) -> list[Task]:
    """The tasks of `section.benchmarks`.

    Args:
      section: the `eval` section of a configuration, its data set named.
      options: see `DataOptions`.
      difficulty: of the embedded world.
      folder: where a judge that costs money keeps its raw answers.

    Raises:
      EvalConfigError: no benchmark, or one that needs a judge and has none.
      ValueError: unknown names, missing or broken data; says which.
    """
    names = resolve(section.benchmarks)
    if not names:
        raise evaluation.EvalConfigError(f"config.eval.benchmarks is empty; name {RSBENCH!r} or some of --list")
    return [_build(name, section, options, difficulty, folder) for name in names]


def _build(
    name: str,
    section: ml_collections.ConfigDict,
    options: DataOptions,
    difficulty: Difficulty | None,
    folder: str | Path | None,
) -> Task:
    limit = {} if options.limit is None else {"limit": options.limit}
    if name == RSBENCH:
        evaluator = evaluation.build_evaluator(section, folder)
        records = evaluation.build_benchmark(section, difficulty)
        return Task(take(records, options.limit), evaluator, None, {"source": section.path or section.name, **limit})
    benchmark = BENCHMARKS[name]
    if benchmark.evaluator is None and not section.evaluator:
        raise evaluation.EvalConfigError(
            f"{name} needs a judge that tells: {benchmark.judge}. Name one with --judge (config.eval.evaluator): "
            "'package.module:NAME', or one of docs/judges.md"
        )
    evaluator = benchmark.evaluator or evaluation.build_evaluator(section, folder)
    fields = options.fields.get(name)
    items, data = benchmark.load(options.root, fields, partial=options.partial, hub=options.hub and bool(benchmark.hub))
    return Task(take(items, options.limit), evaluator, benchmark, {**data, **limit})


def check_pairwise(tasks: Sequence[Task]) -> None:
    """Whether the answers can be compared side by side, save those of a closed form, which is parsed and which nobody prefers.

    Raises:
      EvalConfigError: there are no others, or their judge reads one answer at a time.
    """
    judged = [task for task in tasks if task.benchmark is None or task.benchmark.evaluator is None]
    if alone := [task.evaluator.name for task in judged if task.evaluator.pairwise is None]:
        raise evaluation.EvalConfigError(
            f"--compare: {alone[0]} reads one answer at a time; name with --judge an endpoint, a guard by rubric, or a judge "
            "of yours with an attribute pairwise (docs/judges.md)"
        )
    if not judged:
        raise evaluation.EvalConfigError("--compare: these benchmarks have a closed form, which no judge compares")


def parse_fields(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """`BENCHMARK.FIELD=NAME`, each, as a mapping of mappings.

    Raises:
      EvalConfigError: another form, or an unknown benchmark.
    """
    found: dict[str, dict[str, str]] = {}
    for one in given:
        left, _, name = one.partition("=")
        benchmark, _, field = left.partition(".")
        if not (name and field) or benchmark not in BENCHMARKS:
            raise evaluation.EvalConfigError(f"--fields={one}: give BENCHMARK.FIELD=NAME with a benchmark of --list")
        found.setdefault(benchmark, {})[field] = name
    return found


def parse_share(flag: str, text: str) -> float:
    """A share given as "1%" or "0.01".

    Raises:
      EvalConfigError: anything else, or outside [0, 1].
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise evaluation.EvalConfigError(f"{flag}={text}: give a share such as 1% or 0.01")
    return share


def take(questions: Sequence[Q], limit: int | None) -> Sequence[Q]:
    """About `limit` questions in their order: whole clusters, chosen by a digest of their name rather than from the front.

    Clusters are taken while they fit; at least one is.
    """
    if limit is None or limit >= len(questions):
        return questions
    sizes: dict[str, int] = {}
    for question in questions:
        sizes[question.cluster] = sizes.get(question.cluster, 0) + 1
    chosen: set[str] = set()
    for cluster in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if not chosen or sizes[cluster] <= limit:
            chosen.add(cluster)
            limit -= sizes[cluster]
    return [question for question in questions if question.cluster in chosen]
