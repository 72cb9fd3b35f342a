"""Which evaluator belongs to which data set.

An evaluator is not the judge of training: what a policy was selected for by one reader is measured by another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from srpo_jax.evaluation import checker
from srpo_jax.exploration.judging import judge_name
from srpo_jax.judges.verdict import PairwiseJudge, StepVerdict, Verdict
from srpo_jax.paths import ParsedPath

REFUSAL = "I cannot help with that."
"""The answer of a policy that refuses everything."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Functions that read a response; what they cannot tell is None in their verdicts.

    Either may have a method `batch` that answers many questions at a time (see `exploration.judging.Judge`).

    Attributes:
      name: with a version: stored verdicts are used again under the same name alone.
      answer: verdict of the answer to a question (`data.items.Question`: a record or a benchmark's item); asked for
        responses that have one.
      steps: verdicts of the steps, one for each in `ParsedPath.steps`.
      pairwise: preference between two answers to a question; None where the evaluator reads one answer at a time.
    """

    name: str
    answer: Callable[[Any, ParsedPath], Verdict]
    steps: Callable[[Any, ParsedPath], Sequence[StepVerdict]]
    pairwise: PairwiseJudge | None = None


def unjudged_steps(question: Any, path: ParsedPath) -> list[StepVerdict]:
    """For judges that read the answer alone: every step is unknown."""
    return [StepVerdict(number, None, None, "not judged") for number, _ in enumerate(path.steps, 1)]


def as_evaluator(judge: Callable[..., Any]) -> Evaluator:
    """The evaluator that a judge of answers makes; its attributes `steps` and `pairwise`, where it has them, are used."""
    parts = getattr(judge, "steps", unjudged_steps), getattr(judge, "pairwise", None)
    return Evaluator(judge_name(judge), judge, *parts)


EVALUATORS = {
    "scenes": Evaluator("scenes-checker-1", checker.check_answer, checker.check_steps),
}


def evaluator_for(name: str) -> Evaluator:
    """The evaluator of a data set.

    Raises:
      ValueError: there is none; lists those that there are.
    """
    if name not in EVALUATORS:
        raise ValueError(
            f"no evaluator for data set {name!r} (there are {', '.join(EVALUATORS)}); for your own data pass an "
            "srpo_jax.evaluation.evaluators.Evaluator of your functions"
        )
    return EVALUATORS[name]
