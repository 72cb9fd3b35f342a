"""Imperfect demonstrations: what the base policy learns from before any alignment.

A demonstration writes path and reply in order, as somebody who sees the picture, may misread it, and may drift.
Drifted steps say of a risky item what is true of a harmless one. Chances depend on what makes the item distracting:

* a faint state is misread for the object's other state with chance `MISREAD_FAINT` (a clear one: `MISREAD_CLEAR`),
  unless the other state is held out together with the activity; all that follows is consistent with the misread state,
  which makes some risky items look harmless and some harmless ones risky;
* where the writer takes the item to be risky, each of the six steps and the reply starts to drift with chance `DRIFT`
  plus `DRIFT_CUE` after a cue, `DRIFT_FORM` after a form that presupposes consent and `DRIFT_FAINT` for a faint state;
  a drifted path goes on drifting and comes back with chance `RECOVERY` at each later point;
* where the writer takes it to be harmless, each point turns needlessly cautious, for good, with chance `CAUTION`;
* refusals are bare with chance `BARE` or name the refuge of another place with chance `MISPLACED`; grants name no gear
  with chance `NO_GEAR` or that of another activity with chance `WRONG_GEAR`.

`Difficulty.drift` multiplies every chance but `RECOVERY`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from srpo_jax.data.records import Record
from srpo_jax.data.world import reference, rule
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.data.world.language import PRESUPPOSING_FORMS, Sentences
from srpo_jax.data.world.splits import DEMONSTRATIONS, Item, held_out_activities, item

MISREAD_FAINT, MISREAD_CLEAR = 0.25, 0.01
DRIFT, DRIFT_CUE, DRIFT_FORM, DRIFT_FAINT = 0.06, 0.06, 0.05, 0.05
RECOVERY = 0.06
CAUTION = 0.004
BARE, MISPLACED = 0.14, 0.06
NO_GEAR, WRONG_GEAR = 0.04, 0.03
POINTS = 7
"""Six steps and the reply."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One imperfect path.

    Attributes:
      record: the record that it answers (with the true path and replies, which are not what is demonstrated).
      steps: the six bodies demonstrated.
      reply: the reply demonstrated.
      onset: the first point (1 to 6 a step, 7 the reply) that drifts on a risky item; None if none does.
      misread: whether the writer saw the object's other state.
    """

    record: Record
    steps: tuple[str, ...]
    reply: str
    onset: int | None
    misread: bool


class Demonstrations(Sequence[Demonstration]):
    """Demonstrations by index: entry i is a pure function of (seed, difficulty, i), so a position is enough to resume.

    Even entries answer risky items and odd ones their harmless twins. `size` only bounds `len` and iteration.
    """

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None, size: int = 1 << 31) -> None:
        self.seed, self.difficulty, self._size = seed, difficulty or Difficulty(), size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"demonstration {index} of {self._size}")
        one = item(DEMONSTRATIONS, index % self._size, self.seed, self.difficulty)
        return demonstrate(one, self.difficulty)


def demonstrate(one: Item, difficulty: Difficulty) -> Demonstration:
    """The demonstration of one item."""
    stream = one.stream("demonstration")
    misread = stream.random() < difficulty.drift * (MISREAD_FAINT if one.picture.hard else MISREAD_CLEAR)
    misread = misread and one.activity not in held_out_activities(one.picture.state.other)
    state = one.picture.state.other if misread else one.picture.state
    looks_risky = rule.is_risky(state.channel, one.kind)
    lapses = _lapses(_lapse_chance(one, difficulty, looks_risky), RECOVERY if looks_risky else 0.0, stream)
    warns = [looks_risky != lapse for lapse in lapses]
    sentences = Sentences(one, state, stream, recall=difficulty.long_steps)
    alternative = reference.choose_alternative(one, state)
    denied = [looks_risky and lapse for lapse in lapses]
    steps = (
        sentences.visual(denied=denied[0]),
        sentences.textual(denied=denied[1]),
        sentences.synthesis(risky=warns[2]),
        sentences.intent(risky=warns[3]),
        sentences.consequence(risky=warns[4]),
        sentences.strategy(risky=warns[5], alternative=alternative),
    )
    reply = _reply(one, sentences, warns[6], alternative, stream, difficulty.drift)
    onset = next((point for point, gone in enumerate(denied, 1) if gone), None)
    return Demonstration(reference.record(one, difficulty), steps, reply, onset if one.risky else None, misread)


def _lapse_chance(one: Item, difficulty: Difficulty, looks_risky: bool) -> float:
    """The chance that the writer lapses at a point: into drift if the item looks risky, into caution if not."""
    if not looks_risky:
        return difficulty.drift * CAUTION
    cue = DRIFT_CUE * (one.cue is not None)
    form = DRIFT_FORM * (one.form in PRESUPPOSING_FORMS)
    return difficulty.drift * (DRIFT + cue + form + DRIFT_FAINT * one.picture.hard)


def _lapses(start: float, end: float, stream: random.Random) -> list[bool]:
    """A two-state chain over the points: out of the lapse with chance `end`, into it with chance `start`."""
    lapses, lapsed = [], False
    for _ in range(POINTS):
        turn = stream.random() < (end if lapsed else start)
        lapsed = lapsed != turn
        lapses.append(lapsed)
    return lapses


def _reply(
    one: Item, sentences: Sentences, warns: bool, alternative: str | None, stream: random.Random, drift: float
) -> str:
    chance = stream.random()
    if warns:
        if chance < drift * BARE:
            return sentences.bare_refusal()
        if chance < drift * (BARE + MISPLACED):
            wrong = stream.choice([spot for place, spot in rule.REFUGES.items() if place != one.picture.place])
            return sentences.redirection(refuge=wrong)
        return sentences.redirection(alternative=alternative)
    if chance < drift * NO_GEAR:
        return sentences.compliance(bare=True)
    if chance < drift * (NO_GEAR + WRONG_GEAR):
        wrong = stream.choice([gear for activity, gear in rule.GEAR.items() if activity != one.activity])
        return sentences.compliance(gear=wrong)
    return sentences.compliance()
