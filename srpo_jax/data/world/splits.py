"""Which items each split holds: a pure function from (split, seed, index) to an item.

Items come in twins: item 2j is risky and item 2j + 1 is harmless, with the same picture and person and another request.
Twins come in blocks in which every picture state and every request kind is risky exactly as often as harmless.

Held out from every stage but the test set of that name:

* `combination`: for each picture state one risky and one harmless *activity*, so that the state never meets any of
  the activity's four requests elsewhere (a third of all state x request pairs);
* `rendering`: five layouts and two drawing styles;
* `wording`: for each request kind three of the twelve question forms.
"""

from __future__ import annotations

import dataclasses
import functools
import random

from srpo_jax.data.world import rule
from srpo_jax.data.world.difficulty import Difficulty

SPLITS = ("train", "validation", "test_id", "combination", "rendering", "wording")
DEMONSTRATIONS = "demonstrations"
"""The stream behind the base policy's demonstrations: the factors of `train`, other draws."""

DEFAULT_SIZE = 960
"""Items of a split when no number is asked for: 480 risky and 480 harmless, whole blocks in every split."""

N_LAYOUTS, HELD_OUT_LAYOUTS = 18, (2, 4, 6, 11, 15)
N_STYLES, HELD_OUT_STYLES = 6, (4, 5)
N_FORMS, N_CUES = 12, 4


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn. `key` seeds the continuous variation (offsets, colours, scale, clutter); 0 < `clarity` <= 1."""

    state: rule.State
    place: str
    layout: int
    style: int
    clarity: float
    distractors: int
    second: str | None
    key: str

    @property
    def hard(self) -> bool:
        """Whether the state is faint."""
        return self.clarity < 1


@dataclasses.dataclass(frozen=True)
class Item:
    """One item before it is put into words. `form` and `cue` index the question forms and the opening phrases."""

    split: str
    seed: int
    index: int
    picture: Picture
    kind: str
    person: str
    form: int
    cue: int | None

    @property
    def id(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:06d}"

    @property
    def twin(self) -> str:
        return f"{self.split}-{self.seed}-{self.index ^ 1:06d}"

    @property
    def activity(self) -> str:
        return rule.ACTIVITY_OF[self.kind]

    @property
    def risky(self) -> bool:
        return rule.is_risky(self.picture.state.channel, self.kind)

    def stream(self, purpose: str) -> random.Random:
        """Random numbers of this item for one purpose; strings seed `random.Random` alike on every machine."""
        return random.Random(f"{self.split}/{self.seed}/{self.index}/{purpose}")


def held_out_activities(state: rule.State) -> tuple[str, str]:
    """The risky and the harmless activity that meet `state` in the `combination` split and nowhere else.

    They are never open to complementary pairs of channels: of each, the complement is seen with `state`, so that what is
    held out follows from what is seen.
    """
    rank = [s for s in rule.STATES if s.channel == state.channel].index(state)
    risky, _ = _activities(state.channel)
    opposite = risky[(rank + 1 + rank // 3) % 3]
    complement = next(a for a in rule.ACTIVITIES if not set(rule.EXPOSURES[a]) & set(rule.EXPOSURES[opposite]))
    return risky[rank % 3], complement


def held_out_forms(kind: str) -> frozenset[int]:
    """The three question forms that ask for `kind` in the `wording` split and nowhere else."""
    start = rule.KINDS.index(kind)
    return frozenset((5 * start + 4 * step) % N_FORMS for step in range(3))


def item(split: str, index: int, seed: int, difficulty: Difficulty) -> Item:
    """Item `index` (0, 1, 2, ...; endless) of a split. ValueError for an unknown split or a negative index."""
    if split not in (*SPLITS, DEMONSTRATIONS):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"items are numbered from 0, not {index}")
    number, member = divmod(index, 2)
    held_out = split == "combination"
    size = block_size(split) // 2
    state, risky, harmless = _block(split, seed, number // size, held_out)[number % size]
    shared = random.Random(f"{split}/{seed}/pair/{number}")
    picture = _picture(split, state, shared, difficulty, f"{split}/{seed}/picture/{number}")
    person = shared.choice(tuple(rule.PERSONS))
    own = random.Random(f"{split}/{seed}/{index}/question")
    kind = (risky, harmless)[member]
    forms = held_out_forms(kind) if split == "wording" else set(range(N_FORMS)) - held_out_forms(kind)
    form = own.choice(sorted(forms))
    cue = own.randrange(N_CUES) if own.random() < difficulty.cue else None
    return Item(split, seed, index, picture, kind, person, form, cue)


def block_size(split: str) -> int:
    """Number of consecutive items in which states and requests are exactly balanced."""
    return 48 if split == "combination" else 96


@functools.lru_cache(maxsize=64)
def _block(split: str, seed: int, number: int, held_out: bool) -> tuple[tuple[rule.State, str, str], ...]:
    """The twins (state, risky kind, harmless kind) of one block, shuffled.

    In a block every state meets each of its activities (two risky and two harmless ones, or the two held out) in one of
    their four kinds. Kinds rotate over the states that share channel and activity, and over blocks, so that every
    kind comes up equally often as risky and as harmless.
    """
    stream = random.Random(f"{split}/{seed}/block/{number}")
    twins = []
    for state in rule.STATES:
        sides = []
        for activities in _activities(state.channel):
            chosen = [a for a in activities if (a in held_out_activities(state)) == held_out]
            kinds = [rule.VERBS[a][(_slot(state, a, held_out) + number) % 4] for a in chosen]
            stream.shuffle(kinds)
            sides.append(kinds)
        twins += [(state, risky, harmless) for risky, harmless in zip(*sides, strict=True)]
    stream.shuffle(twins)
    return tuple(twins)


@functools.cache
def _slot(state: rule.State, activity: str, held_out: bool) -> int:
    """Rank of `state` among the states that meet `activity` on the same terms; gives each of four kinds its turn."""
    alike = [s for s in rule.STATES if s.channel == state.channel]
    alike = [s for s in alike if (activity in held_out_activities(s)) == held_out]
    rank = alike.index(state)
    if not held_out:
        return rank
    side = next(side for side in _channels(activity) if state.channel in side)
    return 2 * side.index(state.channel) + rank


def _activities(channel: str) -> tuple[list[str], list[str]]:
    """The three activities open to `channel` and the three that are not."""
    risky = [a for a in rule.ACTIVITIES if channel in rule.EXPOSURES[a]]
    return risky, [a for a in rule.ACTIVITIES if a not in risky]


def _channels(activity: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The two channels that `activity` is open to and the two that it is not."""
    risky = rule.EXPOSURES[activity]
    return risky, tuple(c for c in rule.CHANNELS if c not in risky)


def _picture(split: str, state: rule.State, stream: random.Random, difficulty: Difficulty, key: str) -> Picture:
    held_out = split == "rendering"
    layouts = [i for i in range(N_LAYOUTS) if (i in HELD_OUT_LAYOUTS) == held_out]
    styles = [i for i in range(N_STYLES) if (i in HELD_OUT_STYLES) == held_out]
    others = [thing for thing in rule.OBJECTS if thing != state.object]
    return Picture(
        state=state,
        place=stream.choice(rule.PLACES),
        layout=stream.choice(layouts),
        style=stream.choice(styles),
        clarity=stream.uniform(*difficulty.faintness) if stream.random() < difficulty.hard else 1.0,
        distractors=stream.randint(0, difficulty.distractors),
        second=stream.choice(others) if stream.random() < difficulty.second_object else None,
        key=key,
    )
