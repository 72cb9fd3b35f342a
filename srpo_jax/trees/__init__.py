"""Reasoning trees: one trunk, many branches, and their packing into static shapes."""

from srpo_jax.trees.packing import PackShape, Rows, TreeBatch, balance, pack_rows, pack_shape, pack_trees
from srpo_jax.trees.selection import FAVOURABLE, UNFAVOURABLE, UNKNOWN, select_pairs, usable_branches, verdict_of
from srpo_jax.trees.shapes import (
    EXTRAS,
    PATCHES,
    Ladder,
    PackConfig,
    bucket,
    check_trunks,
    masked_key,
    masked_tokens,
    rows_needed,
)
from srpo_jax.trees.tree import Branch, ReasoningTree, Trunk

__all__ = [
    "EXTRAS",
    "FAVOURABLE",
    "PATCHES",
    "UNFAVOURABLE",
    "UNKNOWN",
    "Branch",
    "Ladder",
    "PackConfig",
    "PackShape",
    "ReasoningTree",
    "Rows",
    "TreeBatch",
    "Trunk",
    "balance",
    "bucket",
    "check_trunks",
    "masked_key",
    "masked_tokens",
    "pack_rows",
    "pack_shape",
    "pack_trees",
    "rows_needed",
    "select_pairs",
    "usable_branches",
    "verdict_of",
]
