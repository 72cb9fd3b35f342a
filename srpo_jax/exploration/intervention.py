"""Intervention pairs: a branch's first unsafe step gives way to the reference's, and the original is the rejected side.

After Zhang et al. 2025 (arXiv 2509.24393). Both sides share everything before the intervention: in `losses.dpo` the shared
tokens cancel, `mask_shared_opening` takes them out of SRPO's means. What follows the intervention is the reference's
remaining path and reply, so the favourable side is off-policy.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from srpo_jax.data.records import Record
from srpo_jax.exploration.explorer import branch_text
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor
from srpo_jax.paths import ParsedPath, parse
from srpo_jax.trees import Branch, ReasoningTree, Trunk

StepsSafe = Callable[[Record, ParsedPath], Sequence[bool | None]]
"""Whether each step of a path is safe; None where unknown."""


def intervene(tree: ReasoningTree, record: Record, steps_safe: StepsSafe, policy: Policy) -> ReasoningTree:
    """The tree with one couple per prefix: its first unfavourable branch that writes an unsafe step, and that branch
    mended.

    Args:
      tree: explored and judged.
      record: of its trunk.
      steps_safe: judges the steps of a path.
      policy: whose tokenizer wrote the branches.

    Returns:
      The tree with these couples alone; a prefix without such a branch has none.
    """
    couples: list[Branch] = []
    for prefix in tree.trunk.prefixes:
        for branch in (b for b in tree.branches if b.prefix == prefix and b.verdict is False):
            path = parse(branch_text(policy, tree.trunk, prefix, branch.tokens), stopped=True, grammar=GRAMMAR)
            safe = list(steps_safe(record, path))
            unsafe = next((i for i in range(prefix, len(safe)) if safe[i] is False), None)
            if unsafe is None or path.deviations(GRAMMAR):
                continue  # safe steps and an unsafe answer, or no steps in order to tell apart: nothing to replace
            couples += [branch, mended(tree.trunk, branch, unsafe + 1, policy.processor)]
            break
    return dataclasses.replace(tree, branches=tuple(couples))


def mended(trunk: Trunk, branch: Branch, number: int, processor: Processor) -> Branch:
    """The branch up to step `number` (from 1), then the reference from that step on."""
    kept = branch.tokens[: step_start(branch.tokens, number, processor)]
    tokens = np.concatenate([kept, trunk.encoded.tokens[trunk.ends[number - 1] :]]).astype(np.int32)
    nothing = np.full(len(tokens), np.nan, np.float32)
    return Branch(branch.prefix, tokens, nothing, "ok", True, f"reference from step {number}", on_policy=False, count=0)


def step_start(tokens: np.ndarray, number: int, processor: Processor) -> int:
    """The token of a branch at which the heading of step `number` begins; with the opening tag for the first of a
    path."""
    text = processor.decode(tokens.tolist())
    found = next((m.start() for m in GRAMMAR.heading.finditer(text) if int(m["number"]) == number), 0)
    if not text[:found].replace(GRAMMAR.opening_tag, "").strip():
        return 0
    lengths = range(len(tokens) + 1)
    return bisect.bisect_right(lengths, found, key=lambda n: len(processor.decode(tokens[:n].tolist()))) - 1
