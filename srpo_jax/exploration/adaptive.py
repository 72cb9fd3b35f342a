"""Adaptive exploration: samples go to prefixes whose verdicts disagree; a prefix of one mind is left early.

Contrast needs favourable *and* unfavourable branches of one prefix. A few samples tell where a policy is of one mind;
the others are worth more. Every prefix gets `first` samples; one whose verdicts then agree is settled, the others get
`wave` more at a time, up to `most`. Because the random bits of a branch depend on its prefix and number alone, what
this finds is a part of what `most` samples everywhere find: `replay` takes that part of a uniformly explored tree.

Branches of earlier rounds can stay for `max_age` rounds and count as samples: a prefix of one mind is left until they are
too old. Their log-probs remain those of the policy that wrote them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from srpo_jax.trees import Branch, ReasoningTree


class Wish(NamedTuple):
    """A branch to sample: `number` counts the samples of this round at the prefix, from 0."""

    tree: ReasoningTree
    prefix: int
    number: int


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    """When a prefix is settled.

    Attributes:
      first: samples that every prefix gets.
      most: samples that no prefix exceeds, those of earlier rounds included.
      wave: samples at a time after the first.
      max_age: rounds that a branch stays after its own; 0 keeps none.

    Raises:
      ValueError: sizes that do not fit together.
    """

    first: int = 2
    most: int = 8
    wave: int = 2
    max_age: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.most or self.wave < 1 or self.max_age < 0:
            raise ValueError(
                f"first={self.first}, most={self.most}, wave={self.wave}, max_age={self.max_age}: use 1 <= first <= most, wave "
                "of at least 1 and max_age of at least 0"
            )


def wanted(verdicts: Sequence[bool | None], config: AdaptiveConfig) -> int:
    """How many samples a prefix gets next, given the verdicts of those that it has (None where unknown); 0 if it is
    settled.

    An unknown verdict settles nothing: a prefix without a known one goes on.
    """
    if len(verdicts) < config.first:
        return config.first - len(verdicts)
    if len({verdict for verdict in verdicts if verdict is not None}) == 1:
        return 0
    return min(config.wave, config.most - len(verdicts))


def wishes(tree: ReasoningTree, config: AdaptiveConfig, prefixes: Iterable[int] | None = None) -> list[Wish]:
    """The next samples of the given prefixes of a tree, of all if None."""
    found = []
    for prefix in tree.trunk.prefixes if prefixes is None else prefixes:
        here = [b for b in tree.branches if b.prefix == prefix]
        fresh = sum(b.age == 0 for b in here)
        found += [Wish(tree, prefix, fresh + i) for i in range(wanted([b.verdict for b in here], config))]
    return found


def carry_over(tree: ReasoningTree, config: AdaptiveConfig) -> ReasoningTree:
    """What a new round starts with: the sampled branches that are not too old, each a round older. Of each prefix the newest,
    with room for a wave: where they disagree, the new policy is asked, too."""
    aged = [dataclasses.replace(b, age=b.age + 1) for b in tree.branches if b.on_policy]
    kept: list[Branch] = []
    for prefix in tree.trunk.prefixes:
        here = [b for b in aged if b.prefix == prefix and b.age <= config.max_age]
        kept += here[max(0, len(here) - max(0, config.most - config.wave)) :]
    return dataclasses.replace(tree, branches=tuple(kept))


def explore_waves(
    trees: Iterable[ReasoningTree], config: AdaptiveConfig, sample: Callable[[Sequence[Wish]], Sequence[Branch]]
) -> list[ReasoningTree]:
    """Grows trees until all prefixes are settled.

    Args:
      trees: trunks without branches, or what `carry_over` left.
      config: when a prefix is settled.
      sample: gives a judged branch for every wish, in order; called once per wave with the wishes of all trees.

    Returns:
      The trees in order, branches by prefix.
    """
    grown = list(trees)
    while wave := [(i, wish) for i, tree in enumerate(grown) for wish in wishes(tree, config)]:
        branches = sample([wish for _, wish in wave])
        for (i, _), branch in zip(wave, branches, strict=True):
            grown[i] = with_branches(grown[i], [branch])
    return grown


def with_branches(tree: ReasoningTree, more: Iterable[Branch]) -> ReasoningTree:
    """The tree with further branches, each after those of its prefix."""
    return dataclasses.replace(tree, branches=tuple(sorted((*tree.branches, *more), key=lambda b: b.prefix)))


def replay(tree: ReasoningTree, config: AdaptiveConfig) -> ReasoningTree:
    """The part of a uniformly explored, judged tree that adaptive exploration would have sampled.

    Raises:
      ValueError: the tree has fewer samples at a prefix than adaptive exploration asks for.
    """
    stored: Mapping[int, list[Branch]] = {i: [b for b in tree.branches if b.prefix == i] for i in tree.trunk.prefixes}

    def sample(asked: Sequence[Wish]) -> list[Branch]:
        for wish in asked:
            if wish.number >= len(stored[wish.prefix]):
                raise ValueError(
                    f"record {tree.trunk.record_id!r}: prefix {wish.prefix} has {len(stored[wish.prefix])} branches, adaptive "
                    f"exploration asks for more; explore with k={config.most}"
                )
        return [stored[wish.prefix][wish.number] for wish in asked]

    return explore_waves([dataclasses.replace(tree, branches=())], config, sample)[0]


def generated_tokens(trees: Iterable[ReasoningTree]) -> int:
    """Tokens that were sampled for the trees in their own round."""
    return sum(len(b.tokens) for tree in trees for b in tree.branches if b.on_policy and b.age == 0)
