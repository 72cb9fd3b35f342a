"""Reasoning trees as people read them: the reference path, the branches that leave it, and every verdict, as text.

A comb needs neither model nor data set. Its source is what an exploration left behind, or an evaluation that continued prefixes
(`interventions`). The report draws whatever lies in `combs/` beside the samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.records import Record
from srpo_jax.evaluation.samples import SAMPLES, SampleStep, write_thumbnail
from srpo_jax.evaluation.statistics import Outcome
from srpo_jax.evaluation.tasks import take
from srpo_jax.exploration.judging import is_favourable
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.files import read_family, write_json
from srpo_jax.judges.verdict import StepVerdict
from srpo_jax.models.processor import Processor
from srpo_jax.paths import ParsedPath, Status, parse

COMBS = "combs"
JudgeSteps = Callable[[Any, ParsedPath], Sequence[StepVerdict]]


class CombsError(ValueError):
    """Trees that are missing or damaged; says which, and what to do."""


@dataclasses.dataclass(frozen=True)
class CombBranch:
    """One continuation.

    Attributes:
      prefix: steps of the trunk before it leaves.
      given: how many of its steps were put there; the others were sampled.
      kind: what was put there, "" for a branch of exploration.
      steps: its own, as found; those put there come first.
      text: all of its own text, for one without an answer.
      answer: None where it has none.
      status: of the whole turn, see `paths.Status`.
      good: what colours it, see `CombSet.good`; None where unknown.
      safe, effective, refused, reason: of the answer.
      count: identical samples that it stands for.
    """

    prefix: int
    given: int
    kind: str
    steps: tuple[SampleStep, ...]
    text: str
    answer: str | None
    status: str
    good: Outcome
    safe: Outcome
    effective: Outcome
    refused: Outcome
    reason: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Comb:
    """A record's reference path and its branches.

    Attributes:
      id, question, risky, category: of the record.
      images: file names of thumbnails in the folder of the samples; None for a picture that could not be opened.
      steps: of the reference path.
      reply: the reference reply.
      branches: in order of their prefixes.
    """

    id: str
    question: str
    images: tuple[str | None, ...]
    risky: bool
    category: str | None
    steps: tuple[SampleStep, ...]
    reply: str
    branches: tuple[CombBranch, ...]


@dataclasses.dataclass(frozen=True)
class CombSet:
    """Trees that belong together.

    Attributes:
      title: whose they are.
      good: what a branch with `CombBranch.good` is called.
      meaning: of that word.
      judge: of the answers.
      step_judge: of the steps, "" where nobody judged them.
      total: how many trees there are; `combs` may be a part.
    """

    title: str
    good: str
    meaning: str
    judge: str
    step_judge: str
    total: int
    combs: tuple[Comb, ...]


def write_combs(folder: str | Path, name: str, found: CombSet) -> None:
    """Writes `combs/NAME.json` in the folder of an evaluation; replaces a file of that name.

    Raises:
      OSError: the disk is full or not writable.
    """
    home = Path(folder) / COMBS
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / f"{name}.json", dataclasses.asdict(found))


def read_combs(folder: str | Path) -> list[CombSet]:
    """All that `write_combs` wrote there, by file name.

    Raises:
      CombsError: a damaged file.
    """
    return [_read(path) for path in sorted((Path(folder) / COMBS).glob("*.json"))]


def _read(path: Path) -> CombSet:
    def steps(told: Sequence[Mapping[str, Any]]) -> tuple[SampleStep, ...]:
        return tuple(SampleStep(**step) for step in told)

    def comb(told: Mapping[str, Any]) -> Comb:
        branches = tuple(CombBranch(**{**one, "steps": steps(one["steps"])}) for one in told["branches"])
        return Comb(**{**told, "images": tuple(told["images"]), "steps": steps(told["steps"]), "branches": branches})

    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return CombSet(**{**told, "combs": tuple(map(comb, told["combs"]))})
    except (ValueError, KeyError, TypeError) as error:
        raise CombsError(f"{path}: damaged ({error}); remove it, or make it again") from error


def make_comb(
    folder: str | Path, record: Record, branches: Sequence[CombBranch], judge_steps: JudgeSteps | None = None
) -> Comb:
    """The comb of a record; writes the thumbnails of its pictures to the samples of `folder`."""
    turn = parse("".join(GRAMMAR.render(record.steps, record.safe_reply)), stopped=True, grammar=GRAMMAR)
    images = tuple(write_thumbnail(Path(folder) / SAMPLES, image) for image in record.images)
    told = (record.id, record.question, images, record.risky, record.category)
    ordered = sorted(branches, key=lambda branch: branch.prefix)
    return Comb(*told, judged_steps(record, turn, judge_steps), record.safe_reply, tuple(ordered))


def judged_steps(record: Record, path: ParsedPath, judge: JudgeSteps | None) -> tuple[SampleStep, ...]:
    """The steps of a path with their verdicts; unknown without a judge of steps."""
    verdicts: Sequence[Any] = judge(record, path) if judge and path.steps else [None] * len(path.steps)
    return tuple(
        SampleStep(s.number, s.title, s.text, v and v.safe, v and v.effective, v.reason if v else "")
        for s, v in zip(path.steps, verdicts, strict=True)
    )


def explored_combs(
    trees: str | Path,
    records: Sequence[Record],
    processor: Processor,
    folder: str | Path,
    *,
    title: str,
    limit: int | None = None,
    favourable: str = "safe_and_effective",
    judge_steps: JudgeSteps | None = None,
    step_judge: str = "",
) -> CombSet:
    """The trees of an exploration, with the verdicts of the judge that was asked last.

    Args:
      trees: the folder of `branches.jsonl` and `verdicts.jsonl`.
      records: whose trees are wanted.
      processor: of the policy that explored.
      folder: of the evaluation, for thumbnails.
      title: see `CombSet`.
      limit: about so many of them (see `tasks.take`); None for all.
      favourable: see `explorer.ExploreConfig`.
      judge_steps: judges the steps, here and now; None leaves them unjudged.
      step_judge: its name.

    Raises:
      CombsError: no trees there, or none of these records.
    """
    lines = {line["record_id"]: line for line in read_family(Path(trees) / "branches.jsonl")}
    wanted = [record for record in records if record.id in lines]
    if not wanted:
        what = "holds no tree of these records" if lines else "holds no trees (branches.jsonl)"
        raise CombsError(f"{trees} {what}; name the folder of an exploration, and the records that it explored")
    verdicts = read_family(Path(trees) / "verdicts.jsonl")
    judge = str(verdicts[-1]["judge"]) if verdicts else ""
    mine = sorted((v for v in verdicts if v["judge"] == judge), key=lambda v: not v.get("failed"))
    known = {(v["record_id"], v["prefix"], v["number"]): v for v in mine}  # a verdict over a failure

    def comb(record: Record) -> Comb:
        branches = _branches(lines[record.id], record, known, processor, favourable, judge_steps)
        return make_comb(folder, record, list(branches), judge_steps)

    combs = tuple(map(comb, take(wanted, limit)))
    wanted_of = "safe" if favourable == "safe" else "safe and effective"
    meaning = f"favourable where the answer is {wanted_of}, on a harmless prompt effective"
    return CombSet(title, "favourable", meaning, judge or "nobody", step_judge, len(lines), combs)


def _branches(
    line: Mapping[str, Any],
    record: Record,
    known: Mapping[tuple[str, int, int], Mapping[str, Any]],
    processor: Processor,
    favourable: str,
    judge_steps: JudgeSteps | None,
) -> Iterator[CombBranch]:
    """The distinct branches of a stored tree."""
    counts: Counter[int] = Counter()
    same = Counter((one["prefix"], *one["tokens"]) for one in line["branches"])
    for one in line["branches"]:
        place = (record.id, one["prefix"], counts[one["prefix"]])
        counts[one["prefix"]] += 1
        if times := same.pop((one["prefix"], *one["tokens"]), 0):
            path = line["tokens"][line["ends"][0] : line["ends"][one["prefix"]]]
            text, own = processor.decode([*path, *one["tokens"]]), processor.decode(one["tokens"])
            # The stored status tells whether it ended; of a loop nothing but the sampler does.
            parsed = parse(text, stopped=one["status"] not in (Status.TRUNCATED, Status.LOOP), grammar=GRAMMAR)
            steps = judged_steps(record, parsed, judge_steps)[one["prefix"] :]
            told = known.get(place, {})
            outcomes = [told.get(name) for name in ("safe", "effective", "refused")]
            good = is_favourable(record, outcomes[0], outcomes[1], favourable) if told else None
            shown = (steps, own, parsed.answer, one["status"], good, *outcomes, told.get("reason", ""), times)
            yield CombBranch(one["prefix"], 0, "", *shown)
