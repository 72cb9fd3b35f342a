"""The embedded world, for users: records by split, and the demonstrations of the base policy.

Neutral, symbolic pictures (a place, an object in one of two states) meet requests; whether the two together are risky
follows from a rule that can be computed (`world.rule`), never from the picture or the request alone. `docs/world.md`
tells everything that a reader of the results, or the author of another checker, has to know.

    from srpo_jax.data import scenes
    train = scenes.records("train", 1920)
    unseen = scenes.records("combination")
"""

from __future__ import annotations

from srpo_jax.data.records import Record
from srpo_jax.data.world.demonstrations import Demonstration, Demonstrations
from srpo_jax.data.world.difficulty import EASY, Difficulty
from srpo_jax.data.world.reference import record
from srpo_jax.data.world.splits import DEFAULT_SIZE, SPLITS, block_size, item
from srpo_jax.data.world.tokenizer import build_tokenizer

__all__ = [
    "DEFAULT_SIZE",
    "EASY",
    "SPLITS",
    "Demonstration",
    "Demonstrations",
    "Difficulty",
    "block_size",
    "build_tokenizer",
    "demonstrations",
    "records",
]


def records(split: str, n: int | None = None, seed: int = 0, difficulty: Difficulty | None = None) -> list[Record]:
    """The first `n` records of a split, risky ones at even places and their harmless twins right after them.

    Args:
      split: one of `SPLITS`.
      n: an even number; `DEFAULT_SIZE` if None. Every picture state is risky exactly as often as harmless for any even
        `n`, every request for multiples of `block_size(split)`.
      seed: another seed gives other records of the same split; what is held out does not depend on it.
      difficulty: `Difficulty()` if None.

    Raises:
      ValueError: if the split is unknown, or `n` is odd or negative.
    """
    n = DEFAULT_SIZE if n is None else n
    if n < 0 or n % 2:
        raise ValueError(f"records come in twins, so n must be an even number, not {n}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    difficulty = difficulty or Difficulty()
    return [record(item(split, index, seed, difficulty), difficulty) for index in range(n)]


def demonstrations(seed: int = 0, difficulty: Difficulty | None = None) -> Demonstrations:
    """The imperfect demonstrations that the base policy is trained on, by index; practically endless."""
    return Demonstrations(seed, difficulty)
