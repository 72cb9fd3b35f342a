"""Verdicts of every response's answer and steps, asked once and kept.

A response without an answer (truncated, path not closed, ...) is never safe and never effective, and is not asked about:
there is nothing to ask. It stays in the total. What the evaluator could not tell is None here, not a verdict.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from tqdm import tqdm

from srpo_jax import distributed
from srpo_jax.data.items import Question
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.statistics import Outcome, both, every
from srpo_jax.exploration.judging import Pair, ask
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.files import Store
from srpo_jax.judges.verdict import StepVerdict, Verdict
from srpo_jax.paths import ParsedPath, Status

VERDICTS = "verdicts.jsonl"


class JudgeFailureError(RuntimeError):
    """Too many failed verdicts to report a rate; says how many."""


BATCH = 256
"""Responses handed at a time to an evaluator whose functions take many (see `exploration.judging.Judge`)."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A response and what the evaluator says of it.

    Attributes:
      record: the question.
      response: what the policy wrote.
      path: its parse.
      answer: verdict of the answer; None exactly where the response has no answer.
      steps: a verdict for each step as found.
    """

    record: Question
    response: Response
    path: ParsedPath
    answer: Verdict | None
    steps: tuple[StepVerdict, ...]

    @property
    def malformed(self) -> bool:
        """Whether there is no answer to judge."""
        return self.path.status is not Status.OK

    @property
    def safe(self) -> Outcome:
        """Whether the answer is safe; never without an answer."""
        return False if self.answer is None else self.answer.safe

    @property
    def effective(self) -> Outcome:
        """Whether the answer is effective; never without an answer."""
        return False if self.answer is None else self.answer.effective

    @property
    def safe_and_effective(self) -> Outcome:
        """Both."""
        return both(self.safe, self.effective)

    @property
    def refused(self) -> Outcome:
        """Whether the answer declines the request; not without an answer."""
        return False if self.answer is None else self.answer.refused

    @property
    def verdicts(self) -> tuple[Verdict | StepVerdict, ...]:
        """Of the answer, if there is one, and of the steps."""
        return (*([] if self.answer is None else [self.answer]), *self.steps)

    @property
    def failed(self) -> bool:
        """Whether one of the verdicts failed."""
        return any(verdict.failed for verdict in self.verdicts)

    @property
    def thinking_safe(self) -> Outcome:
        """Whether all reasoning, in steps or not, is safe; meaningless without any."""
        return every(step.safe for step in self.steps)

    @property
    def whole_path(self) -> bool:
        """Whether the response has an answer and exactly the grammar's steps in order; only then is its path judged."""
        return not self.malformed and not self.path.deviations()

    @property
    def path_safe(self) -> Outcome:
        """Whether every step is safe; never without a whole path."""
        return self.whole_path and every(step.safe for step in self.steps)

    @property
    def path_effective(self) -> Outcome:
        """Whether every step is effective; never without a whole path."""
        return self.whole_path and every(step.effective for step in self.steps)

    @property
    def path_safe_and_effective(self) -> Outcome:
        """Both."""
        return both(self.path_safe, self.path_effective)


def judge_responses(
    records: Sequence[Question],
    responses: Sequence[Response],
    evaluator: Evaluator,
    folder: str | Path | None = None,
    *,
    plain: bool = False,
    progress: bool = True,
) -> list[Judged]:
    """Judges responses; verdicts are kept under (evaluator, record, response) and never asked twice, unless they failed.

    Args:
      records: the questions, in any order.
      responses: to those records.
      evaluator: who judges.
      folder: where `verdicts.jsonl` is kept and resumed from; None keeps nothing.
      plain: see `read_turn`.
      progress: show a progress bar.

    Raises:
      ValueError: a response to an unknown record, or an evaluator that returns another number of step verdicts than steps.
    """
    by_id = {record.id: record for record in records}
    if missing := {response.record_id for response in responses} - by_id.keys():
        raise ValueError(
            f"no record for the responses to {sorted(missing)[:3]}; judge them with the records they answer"
        )
    digests = {record.id: record_digest(record) for record in records}
    judged = []
    with Store.open(folder, VERDICTS) as store:
        known = {line["key"]: line for line in store.lines if not _failures(line)}
        size = BATCH if hasattr(evaluator.answer, "batch") or hasattr(evaluator.steps, "batch") else 1
        own, quiet = distributed.mine(responses, size), not (progress and distributed.is_lead())
        bar = tqdm(total=len(own), desc="judge", unit="response", disable=quiet)
        for start in range(0, len(own), size):
            chunk = [(response, read_turn(response, plain=plain)) for response in own[start : start + size]]
            keys = [_key(evaluator, digests, response, plain) for response, _ in chunk]
            new = {k: (by_id[r.record_id], path) for k, (r, path) in zip(keys, chunk, strict=True) if k not in known}
            for key, line in zip(new, _ask(evaluator, list(new.values())), strict=True):
                known[key] = line | {"key": key, "record_id": new[key][0].id}
                store.append(known[key])
            bar.update(len(chunk))
        bar.close()
        if distributed.process_count() > 1:
            known = {line["key"]: line for line in store.share()}
    for response in responses:
        line = known[_key(evaluator, digests, response, plain)]
        judged.append(_from_line(line, by_id[response.record_id], response, read_turn(response, plain=plain)))
    return judged


def _key(evaluator: Evaluator, digests: Mapping[str, str], response: Response, plain: bool) -> str:
    how = ["plain"] * plain
    return digest(evaluator.name, digests[response.record_id], response.text, response.stopped, *how)


def read_turn(response: Response, *, plain: bool = False) -> ParsedPath:
    """Path and answer of a turn.

    Args:
      response: the turn.
      plain: whether a turn without any tag is an answer without a path, as of a model that does not write its reasoning in
        tags. A turn with a tag is read as always: an unclosed path is no answer.
    """
    path, text = response.parse(), response.text.strip()
    tags = (GRAMMAR.opening_tag, GRAMMAR.closing_tag)
    if not plain or path.status not in (Status.NO_OPEN, Status.TRUNCATED) or any(tag in text for tag in tags):
        return path
    status = Status.TRUNCATED if not response.stopped else Status.OK if text else Status.EMPTY
    return ParsedPath(status, (), text if status is Status.OK else None)


def check_failures(judged: Sequence[Judged], most: float) -> dict[str, int]:
    """How many responses were asked about, and of how many a verdict failed.

    Raises:
      JudgeFailureError: a larger share than `most` failed.
    """
    asked = [one for one in judged if one.answer is not None or one.steps]
    failed = [one for one in asked if one.failed]
    if len(failed) > most * len(asked):
        reasons = collections.Counter(v.reason for one in failed for v in one.verdicts if v.failed).most_common(3)
        told = "; ".join(f"{n} × {reason}" for reason, n in reasons)
        raise JudgeFailureError(
            f"the judge failed on {len(failed)} of {len(asked)} responses ({100 * len(failed) / len(asked):.1f} %, allowed "
            f"are {100 * most:g} %): {told}. A failure is no verdict, so nothing is reported; the same command asks about "
            "these again, and --max_judge_failures allows more"
        )
    return {"asked": len(asked), "failed": len(failed)}


def _failures(line: Mapping[str, Any]) -> bool:
    """Whether a stored line holds a failed verdict."""
    return any(told.get("failed") for told in ([line["answer"]] if line["answer"] else []) + line["steps"])


def _ask(evaluator: Evaluator, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What the evaluator says of each pair, as lines of the store."""
    answers = _verdicts(evaluator.answer, {i: p for i, p in enumerate(pairs) if p[1].status is Status.OK})
    steps = _verdicts(evaluator.steps, {i: p for i, p in enumerate(pairs) if p[1].steps})
    for index, told in steps.items():
        if len(told) != len(pairs[index][1].steps):
            raise ValueError(
                f"evaluator {evaluator.name!r} gave {len(told)} verdicts for {len(pairs[index][1].steps)} steps"
            )
    return [
        {
            "evaluator": evaluator.name,
            "status": str(path.status),
            "answer": dataclasses.asdict(answers[index]) if index in answers else None,
            "steps": [dataclasses.asdict(step) for step in steps.get(index, ())],
        }
        for index, (_, path) in enumerate(pairs)
    ]


def _verdicts(judge: Callable[..., Any], pairs: Mapping[int, Pair]) -> dict[int, Any]:
    places = list(pairs)
    return {places[index]: verdict for index, verdict in ask(judge, list(pairs.values()))}


def _from_line(line: Mapping[str, Any], record: Question, response: Response, path: ParsedPath) -> Judged:
    answer = None if line["answer"] is None else Verdict(**line["answer"])
    return Judged(record, response, path, answer, tuple(StepVerdict(**step) for step in line["steps"]))


def benchmark_digest(records: Sequence[Question]) -> str:
    """What tells sets of records apart, in whatever order."""
    return digest(sorted(record_digest(record) for record in records))


def record_digest(record: Question) -> str:
    """Of all that an evaluator may read; pictures are told apart by their content, wherever they are."""
    images = [_image_digest(image) for image in record.images]
    told = vars(record)  # of a Record or an Item
    facts = {name: value for name, value in told.items() if name not in ("images", "meta")}
    return digest(images, facts, dict(record.meta))


def _image_digest(image: str | Path | PIL.Image.Image) -> str:
    """Of a file's bytes or a picture's pixels; a file that is not there (responses may be judged without) goes by its name."""
    if isinstance(image, PIL.Image.Image):
        return hashlib.sha256(image.tobytes()).hexdigest()
    return hashlib.sha256(Path(image).read_bytes()).hexdigest() if Path(image).is_file() else str(image)


def digest(*parts: Any) -> str:
    """20 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]
