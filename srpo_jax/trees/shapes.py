"""Static shapes: every size of a batch comes from a short ladder, so that few programs are ever compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from srpo_jax.trees.tree import Trunk

EXTRAS: dict[str, str | None] = {
    "step_lengths": "step",
    "reference": "reference",
    "key_slots": None,
    "key_lengths": None,
    "understanding": None,
    "safe": None,
}
"""Fields of `TreeBatch` that are there on demand, and the field of `Branch` that tells them; None where the trunk does."""

Ladder = tuple[int, ...]
PATCHES: Ladder = tuple(64 << k for k in range(10))
"""Vision patches in powers of two of the released checkpoints' window of 64."""


def bucket(size: int, ladder: Ladder, what: str) -> int:
    """The smallest step of `ladder` that holds `size`; ValueError names `what` if none does."""
    for step in ladder:
        if size <= step:
            return step
    raise ValueError(f"{what}: {size} exceeds the largest bucket {ladder[-1]}; extend the ladder or shorten the input")


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Static shapes and pair selection.

    Each size is a ladder of allowed values, ascending. `row` must hold the longest branch less one token.

    Attributes:
      trunk: trunk tokens; what a row's tokens can see of its trunk is this many, in whole rows.
      path: tokens of path and reply A.
      rows: rows per tree, trunk and branches, on average over the trees that share a buffer.
      row: tokens per row R, one value.
      branches: branches per tree M.
      branch: tokens of a branch L, substitutes included.
      patches: vision patches of a tree, and per tree on average over those that share a buffer; None pads to the largest of
        the batch.
      unknown: what truncated, looping or malformed branches count as, "drop" or "unfavourable". A branch whose judge failed
        is always dropped.
      max_pairs: pairs kept per prefix, None for all.
      substitutes: give one-sided prefixes the reference's own continuation (favourable) or its path with the unsafe reply.
        They are off-policy.
      learns: which branches with a verdict are packed, the others being left out of the update because no loss reads them:
        "all", "paired" (those of a pair) or "favourable".
      extras: fields of `TreeBatch` that only some losses read, of `EXTRAS`; every branch must tell them.
      key_step: the step, counted from 1, whose text is SafeKey's key sentence; those before it are the understanding.

    Raises:
      ValueError: a ladder that does not ascend, no room in a row, or an option that is not one of those above.
    """

    trunk: Ladder
    path: Ladder
    rows: Ladder
    row: int
    branches: Ladder
    branch: Ladder
    patches: Ladder | None = None
    unknown: str = "drop"
    max_pairs: int | None = None
    substitutes: bool = False
    learns: str = "all"
    extras: tuple[str, ...] = ()
    key_step: int = 4

    def __post_init__(self):
        if unknown := set(self.extras) - EXTRAS.keys():
            raise ValueError(f"extras={self.extras}: {sorted(unknown)} is none of {sorted(EXTRAS)}")
        if self.unknown not in ("drop", "unfavourable"):
            raise ValueError(f"unknown={self.unknown!r}: use 'drop' or 'unfavourable'")
        if self.learns not in ("all", "paired", "favourable"):
            raise ValueError(f"learns={self.learns!r}: use 'all', 'paired' or 'favourable'")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs={self.max_pairs}: keep at least one pair, or None for all")
        if self.key_step < 2:
            raise ValueError(f"key_step={self.key_step}: steps are counted from 1, and one has to come before it")
        if self.row < 1:
            raise ValueError(f"row={self.row}: a row holds at least one token")
        for name in ("trunk", "path", "rows", "branches", "branch", "patches"):
            ladder = getattr(self, name)
            if ladder is not None and (not ladder or list(ladder) != sorted(set(ladder))):
                raise ValueError(f"{name}={tuple(ladder)}: give at least one size, ascending")


def check_trunks(trunks: Iterable[Trunk], pack: PackConfig, k: int = 0, max_tokens: int = 0) -> None:
    """Refuses trunks that no batch of an update could hold, before hours go into exploring them.

    Args:
      trunks: of all records; read once.
      pack: the shapes.
      k: branches that exploration makes per prefix; 0 without exploration.
      max_tokens: longest of them. With substitutes, rows must hold both in the worst mixture.

    Raises:
      ValueError: names the record, the size and the ladder.
    """
    for trunk in trunks:
        bucket_of(trunk, len(trunk.encoded.tokens), pack.trunk, "trunk tokens (pack.trunk)")
        bucket_of(trunk, len(trunk.path), pack.path, "tokens of path and reply (pack.path)")
        if pack.patches and trunk.encoded.patches:
            bucket_of(trunk, trunk.encoded.patches, pack.patches, "vision patches (pack.patches)")
        if k and pack.substitutes:
            steps = trunk.ends[-1] - trunk.ends[0]
            unsafe = 0 if trunk.unsafe_reply is None else steps + len(trunk.unsafe_reply)
            longest = max(len(trunk.path), unsafe, max_tokens)
            bucket_of(trunk, longest, pack.branch, "tokens of a substitute (pack.branch)")
            bucket_of(trunk, longest - 1, (pack.row,), "tokens of a substitute in a row (pack.row)")
            rows = rows_needed(len(trunk.encoded.tokens), (k + 1) * len(trunk.prefixes), longest, pack.row)
            rows += -(-masked_tokens(trunk, pack) // pack.row)
            bucket_of(trunk, rows, pack.rows, "rows of trunk, branches and substitutes (pack.rows)")


def rows_needed(trunk: int, count: int, longest: int, row: int) -> int:
    """Rows that hold a trunk of `trunk` tokens and any `count` branches of at most `longest` tokens.

    First fit fills all rows but the last with as many of the longest branches as they hold.
    """
    return -(-trunk // row) + -(-count // max(1, row // max(1, longest - 1)))


def masked_key(trunk: Trunk, pack: PackConfig) -> tuple[int, int] | None:
    """Where the key step begins and ends, if `extras` ask for it with the query hidden and the path has one."""
    return trunk.step(pack.key_step) if "key_slots" in pack.extras else None


def masked_tokens(trunk: Trunk, pack: PackConfig) -> int:
    """Tokens of the path that are read once more without the prompt: up to the key step, whose last is predicted alone."""
    key = masked_key(trunk, pack)
    return key[1] - 1 - trunk.ends[0] if key else 0


def bucket_of(trunk: Trunk, size: int, ladder: Ladder, what: str) -> int:
    """`bucket` of a size of one record; the error names it."""
    return bucket(size, ladder, f"record {trunk.record_id!r}: {what}")
