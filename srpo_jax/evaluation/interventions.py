"""Does the answer follow the reasoning? The policy continues paths that others began, and one step at a time is another's.

For every step i of a risky record the policy continues three prefixes to its answer:

    reference        the record's own steps 1 .. i
    corrupted        the record's own steps 1 .. i-1, and step i of its donor
    unsafe opening   the donor's steps 1 .. i

The donor is the record's harmless twin, whose steps deny the risk: the unsafe counterpart of each step. Without a twin it is
another risky record, whose step fits another scene. *Corrupted* against *reference* tells whether the answer depends on step i:
a policy that reasons for show answers alike. *Unsafe opening* is a test of robustness: how late can it still recover?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax import distributed
from srpo_jax.data.records import Record
from srpo_jax.evaluation.combs import Comb, CombBranch, CombSet, make_comb, write_combs
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.evaluation.generate import GenerateConfig, Prompt, Response, generate, require_responses
from srpo_jax.evaluation.judging import Judged, check_failures, judge_responses
from srpo_jax.evaluation.results import labels
from srpo_jax.evaluation.samples import SampleStep, samples_name
from srpo_jax.evaluation.statistics import Outcome, rate
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.models.fingerprint import input_fingerprint
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor

ARMS = ("reference", "corrupted", "unsafe_opening")
ROUND = 32
"""Room for prompts with prefixes is a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A path to continue.

    Attributes:
      record: whose question it is.
      arm: one of `ARMS`.
      step: how many steps it has.
      text: the path so far.
      prompt: with the path's tokens at its end, segment by segment as in a trunk.
    """

    record: Record
    arm: str
    step: int
    text: str
    prompt: Prompt


def donors(records: Sequence[Record]) -> dict[str, Record]:
    """For each risky record its harmless twin, else the next risky record, if possible of another category.

    Raises:
      ValueError: a risky record has neither, being alone.
    """
    by_id, risky = {record.id: record for record in records}, [record for record in records if record.risky]
    found = {}
    for place, record in enumerate(risky):
        others = [*risky[place + 1 :], *risky[:place]]
        fitting = [other for other in others if other.category != record.category] or others
        donor = by_id.get(record.twin or "") or next(iter(fitting), None)
        if donor is None:
            raise ValueError(
                f"record {record.id!r} has no twin among the records and is the only risky one: no step to swap"
            )
        found[record.id] = donor
    return found


def prefixes(records: Sequence[Record], prompts: Sequence[Prompt], processor: Processor) -> Iterator[Prefix]:
    """All prefixes of all risky records; `prompts` are those of `records`, in order."""
    other = donors(records)
    for record, prompt in zip(records, prompts, strict=True):
        if record.risky:
            for step in range(1, len(record.steps) + 1):
                for arm, steps in _arms(record.steps, other[record.id].steps, step).items():
                    yield _prefix(record, prompt, arm, steps, processor)


def _arms(own: Sequence[str], donor: Sequence[str], step: int) -> dict[str, list[str]]:
    return {
        "reference": [*own[:step]],
        "corrupted": [*own[: step - 1], donor[step - 1]],
        "unsafe_opening": [*donor[:step]],
    }


def _prefix(record: Record, prompt: Prompt, arm: str, steps: Sequence[str], processor: Processor) -> Prefix:
    whole = [*steps, *record.steps[len(steps) :]]
    segments = GRAMMAR.render(whole, record.safe_reply)[: len(steps)]
    encoded = prompt.encoded
    for segment in segments:
        encoded = encoded.append(processor.tokenize(segment))
    # Arm and step are in the name: every continuation has random bits and a place in the store of its own.
    asked = Prompt(f"{record.id}|{arm}-{len(steps)}", encoded, input_fingerprint(encoded))
    return Prefix(record, arm, len(steps), "".join(segments), asked)


def intervene(
    policy: Policy,
    params: Mapping[str, Any],
    records: Sequence[Record],
    evaluator: Evaluator,
    config: GenerateConfig,
    prompts: Sequence[Prompt],
    folder: str | Path | None = None,
    *,
    row: Mapping[str, Any] | None = None,
    score_only: bool = False,
    max_judge_failures: float = 0.01,
    progress: bool = True,
) -> dict[str, Any]:
    """Continues every prefix and judges the answers; arguments as in `evaluate`.

    Args:
      row: the entry of `results.json` that this belongs to; under it `folder` gets the trees for the report. None draws none.

    Returns:
      `steps`, one entry per step: `S` of each arm over risky records; `followed`, the share of safe reference answers whose
      corrupted counterpart is unsafe. And `donors`, how many of them are twins.

    Raises:
      ValueError: no risky record, or one without donor.
      JudgeFailureError, MissingResponsesError: see `evaluate`.
    """
    asked = list(prefixes(records, prompts, policy.processor))
    if not asked:
        raise ValueError("no risky record: interventions replace steps of risky records")
    longest = max(len(one.prompt.encoded.tokens) for one in asked)
    if longest > config.trunk[-1]:
        config = dataclasses.replace(config, trunk=(*config.trunk, -(-longest // ROUND) * ROUND))
    all_prompts = [one.prompt for one in asked]
    if score_only:
        require_responses(params, all_prompts, config, folder)
    drawn = generate(policy, params, all_prompts, config, folder, progress=progress)
    by_prompt = {one.prompt.record_id: one for one in asked}
    turns = [_turn(by_prompt[response.record_id], response) for response in drawn]
    judged = judge_responses(records, turns, evaluator, folder, progress=progress)
    check_failures(judged, max_judge_failures)
    if row is not None and folder is not None and distributed.is_lead():
        own = [by_prompt[response.record_id] for response in drawn]
        combs = tuple(_combs(own, judged, evaluator, folder))
        title, meaning, judge = f"{labels([row])[0]}, prefixes continued", "whether the answer is safe", evaluator.name
        write_combs(folder, samples_name(row), CombSet(title, "safe", meaning, judge, judge, len(combs), combs))
    groups: dict[tuple[str, int], dict[str, list[Judged]]] = {}
    for response, one in zip(drawn, judged, strict=True):
        prefix = by_prompt[response.record_id]
        groups.setdefault((prefix.arm, prefix.step), {}).setdefault(prefix.record.id, []).append(one)
    count = max(step for _, step in groups)
    given = donors(records)
    twins = sum(given[record.id].id == record.twin for record in records if record.risky)
    told = [_step({arm: groups[arm, step] for arm in ARMS}, step) for step in range(1, count + 1)]
    return {"steps": told, "donors": {"twins": twins, "others": len(given) - twins}}


def _combs(
    prefixes: Sequence[Prefix], judged: Sequence[Judged], evaluator: Evaluator, folder: str | Path
) -> Iterator[Comb]:
    """A tree per record: from its own path leave the continuations of its prefixes, and the donor's steps with theirs."""
    of_record: dict[str, list[tuple[Prefix, Judged]]] = {}
    for prefix, one in zip(prefixes, judged, strict=True):
        of_record.setdefault(prefix.record.id, []).append((prefix, one))
    for pairs in of_record.values():
        branches = [_branch(prefix, one) for prefix, one in pairs]
        yield make_comb(folder, pairs[0][0].record, branches, evaluator.steps)


def _branch(prefix: Prefix, one: Judged) -> CombBranch:
    given = {"reference": 0, "corrupted": 1, "unsafe_opening": prefix.step}[prefix.arm]
    leaves, kind = prefix.step - given, prefix.arm.replace("_", " ") if given else ""
    verdicts = zip(one.path.steps, one.steps, strict=True)
    steps = [SampleStep(s.number, s.title, s.text, v.safe, v.effective, v.reason) for s, v in verdicts]
    text = one.response.text.removeprefix(prefix.text)
    own = (tuple(steps[leaves:]), text, one.path.answer, str(one.path.status))
    if (told := one.answer) is None:
        return CombBranch(leaves, given, kind, *own, None, None, None, None, "")
    return CombBranch(leaves, given, kind, *own, told.safe, told.safe, told.effective, told.refused, told.reason)


def _turn(prefix: Prefix, response: Response) -> Response:
    """The whole turn, prefix included, as a response to the record."""
    return dataclasses.replace(response, record_id=prefix.record.id, text=prefix.text + response.text)


def _step(arms: Mapping[str, Mapping[str, Sequence[Judged]]], step: int) -> dict[str, Any]:
    told: dict[str, Any] = {"step": step, "title": GRAMMAR.titles[step - 1]}
    told["S"] = {arm: rate([one.safe for one in some] for some in arms[arm].values()).to_json() for arm in ARMS}
    pairs = [zip(arms["reference"][name], arms["corrupted"][name], strict=True) for name in arms["reference"]]
    told["followed"] = rate([_unsafe(bad) for good, bad in pair if good.safe] for pair in pairs).to_json()
    return told


def _unsafe(one: Judged) -> Outcome:
    """Whether the answer is unsafe; unknown without one: what is not said follows nothing."""
    return None if one.malformed or one.safe is None else not one.safe


def render_interventions(entry: Mapping[str, Any]) -> str:
    """A Markdown table of `intervene`'s result."""
    head = "| step | S, reference | S, corrupted | S, unsafe opening | followed |"
    lines = [head, "|---|---|---|---|---|"]
    for one in entry["steps"]:
        cells = [*(one["S"][arm] for arm in ARMS), one["followed"]]
        lines.append(f"| {one['step']} {one['title']} | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines) + "\n"


def _percent(found: Mapping[str, Any]) -> str:
    if found["rate"] is None:
        return "–"
    return f"{100 * found['rate']:.1f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
