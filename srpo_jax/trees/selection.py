"""Which branches of a tree an update learns from, and which of them it compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from srpo_jax.trees.shapes import PackConfig
from srpo_jax.trees.tree import Branch, ReasoningTree, Trunk

FAVOURABLE, UNFAVOURABLE, UNKNOWN = 1, 0, -1


def verdict_of(branch: Branch, unknown: str = "drop") -> int:
    """FAVOURABLE, UNFAVOURABLE or UNKNOWN, after the policy for branches without a verdict."""
    if branch.verdict is not None:
        return FAVOURABLE if branch.verdict else UNFAVOURABLE
    malformed = branch.status not in ("ok", "judge_failed")
    return UNFAVOURABLE if malformed and unknown == "unfavourable" else UNKNOWN


def usable_branches(tree: ReasoningTree, config: PackConfig) -> tuple[list[Branch], list[int], dict[str, int]]:
    """Distinct branches with a known verdict that `config.learns` asks for, their verdicts, and how many were merged, dropped
    as unknown, or left idle because no loss reads them.

    Branches with the same tokens at the same prefix are one branch, which counts them. If their judges disagree, it is unknown.
    """
    merged: dict[tuple[int, bytes], list[Branch]] = {}
    for branch in tree.branches:
        merged.setdefault((branch.prefix, branch.tokens.tobytes()), []).append(branch)
    kept = []
    for same in merged.values():
        verdicts = {verdict_of(branch, config.unknown) for branch in same}
        if len(verdicts) == 1 and UNKNOWN not in verdicts:
            kept.append((dataclasses.replace(same[0], count=sum(b.count for b in same)), verdicts.pop()))
    if config.substitutes:
        kept += _substitutes(tree.trunk, kept)
    counts = {"merged": len(tree.branches) - len(merged), "dropped": len(merged) - sum(b.on_policy for b, _ in kept)}
    read = [one for one, reads in zip(kept, _read(kept, config), strict=True) if reads]
    counts["idle"] = len(kept) - len(read)
    return [b for b, _ in read], [v for _, v in read], counts


def _read(kept: Sequence[tuple[Branch, int]], config: PackConfig) -> list[bool]:
    """Which branches the losses read. Pairs selected from these alone are the pairs selected from all."""
    verdicts = [verdict for _, verdict in kept]
    if config.learns == "paired":
        pairs = select_pairs([b.prefix for b, _ in kept], verdicts, config.max_pairs)
        used = set(np.concatenate(np.nonzero(pairs)).tolist())
        return [m in used for m in range(len(kept))]
    return [config.learns == "all" or verdict == FAVOURABLE for verdict in verdicts]


def _substitutes(trunk: Trunk, kept: Sequence[tuple[Branch, int]]) -> list[tuple[Branch, int]]:
    """Complete off-policy continuations for prefixes whose branches all fell on one side."""
    extra = []
    for i in trunk.prefixes:
        sides = {verdict for branch, verdict in kept if branch.prefix == i}
        if sides == {UNFAVOURABLE}:
            extra.append((_off_policy(i, trunk.encoded.tokens[trunk.ends[i] :], True), FAVOURABLE))
        elif sides == {FAVOURABLE} and trunk.unsafe_reply is not None:
            steps = trunk.encoded.tokens[trunk.ends[i] : trunk.ends[-1]]
            extra.append((_off_policy(i, np.concatenate([steps, trunk.unsafe_reply]), False), UNFAVOURABLE))
    return extra


def _off_policy(prefix: int, tokens: np.ndarray, verdict: bool) -> Branch:
    nothing = np.full(len(tokens), np.nan, np.float32)
    return Branch(prefix, tokens, nothing, "ok", verdict, "substitute from the record", on_policy=False, count=0)


def select_pairs(
    prefixes: Sequence[int] | np.ndarray, verdicts: Sequence[int] | np.ndarray, max_pairs: int | None = None
) -> np.ndarray:
    """bool[M, M]: every favourable branch against every unfavourable one of its prefix.

    With `max_pairs`, a prefix keeps pairs along the diagonals of its favourable × unfavourable table, so that every branch
    appears before any appears twice.
    """
    prefix, verdict = np.asarray(prefixes, int), np.asarray(verdicts, int)
    pairs = np.zeros((len(prefix), len(prefix)), bool)
    for i in sorted(set(prefix.tolist())):
        plus = np.flatnonzero((prefix == i) & (verdict == FAVOURABLE))
        minus = np.flatnonzero((prefix == i) & (verdict == UNFAVOURABLE))
        grid = [(a, b) for a in range(len(plus)) for b in range(len(minus))]
        grid.sort(key=lambda ab: ((ab[1] - ab[0]) % len(minus), ab[0]))
        for a, b in grid[:max_pairs]:
            pairs[plus[a], minus[b]] = True
    return pairs
