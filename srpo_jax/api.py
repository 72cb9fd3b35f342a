"""The functions that `import srpo_jax as sx` offers beside those of the modules themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models import policy as policies
from srpo_jax.models.policy import Policy
from srpo_jax.models.scoring import score_trees
from srpo_jax.runs import is_run, load_run
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.step import tree_loss
from srpo_jax.trees import PackConfig, ReasoningTree, TreeBatch, pack_trees, rows_needed


def load_policy(path: str | Path, **options: Any) -> Policy:
    """The policy in a Hugging Face folder, or that of a training run.

    Args:
      path: a folder in Hugging Face's format, or a work directory of training.
      **options: of a folder those of `models.policy.load_policy` (`dtype`, `max_image_tokens`, ...); of a run those of
        `runs.load_run`: `step` (default: the newest checkpoint) and `mesh`. How a run reads images and text is part of
        the run.

    Raises:
      FileNotFoundError: neither is there.
      TypeError: an option of the other kind.
    """
    return load_run(path, **options)[0] if is_run(path) else policies.load_policy(path, **options)


def pack(trees: Sequence[ReasoningTree], policy: Policy | None = None, config: PackConfig | None = None) -> TreeBatch:
    """Trees as one batch.

    Args:
      trees: at least one.
      policy: whose vocabulary the trees must belong to; None does not check.
      config: the shapes; None takes small ones from coarse ladders, so that similar trees share a compiled program.

    Raises:
      ValueError: no trees, a tree that does not fit `config`, or one with token ids that the policy does not have.
    """
    _check_vocabulary(trees, policy)
    return pack_trees(trees, config or _fitting(trees))[0]


def _check_vocabulary(trees: Sequence[ReasoningTree], policy: Policy | None) -> None:
    """Raises ValueError without trees, and for token ids that the policy does not have."""
    if not trees:
        raise ValueError("no trees: give at least one")
    vocabulary = float("inf") if policy is None else policy.config.text.vocab_size
    for tree in trees:
        largest = max(int(x.max(initial=0)) for x in (tree.trunk.encoded.tokens, *(b.tokens for b in tree.branches)))
        if largest >= vocabulary:
            raise ValueError(
                f"record {tree.trunk.record_id!r}: token id {largest} is none of the policy's {vocabulary}; the tree was "
                "explored with another tokenizer"
            )


def _fitting(trees: Sequence[ReasoningTree]) -> PackConfig:
    longest = max((len(b.tokens) for t in trees for b in t.branches), default=1)
    trunk = max(len(t.trunk.encoded.tokens) for t in trees)
    count = max(len(t.branches) for t in trees)
    row = policies.bucket(max(longest - 1, 1), 16)
    return PackConfig(
        trunk=(policies.bucket(trunk, 16),),
        path=(policies.bucket(max(len(t.trunk.path) for t in trees), 16),),
        rows=tuple(sorted({policies.bucket(n) for n in range(1, rows_needed(trunk, count, longest, row) + 1)})),
        row=row,
        branches=(policies.bucket(count) if count else 0,),
        branch=(row + 1,),
    )


def score(
    policy: Policy,
    params: Mapping[str, Any] | None,
    trees: Sequence[ReasoningTree],
    config: PackConfig | None = None,
    *,
    batch: int = 8,
) -> list[ReasoningTree]:
    """The trees with the log-probs of their branches under this policy, whoever wrote the branches.

    Args:
      policy: whose module to use.
      params: the parameters; None takes the policy's.
      trees: at least one; verdicts stay as they are.
      config: shapes, such as those of an update; None takes ones that fit (see `pack`).
      batch: trees scored together, a multiple of the data × fsdp devices of a mesh.

    Raises:
      ValueError: as `pack`.
    """
    _check_vocabulary(trees, policy)
    params = policy.params if params is None else params
    scores = score_trees(policy.graphdef, params, trees, config or _fitting(trees), batch)
    return [
        dataclasses.replace(
            tree, branches=tuple(dataclasses.replace(b, logprobs=x) for b, x in zip(tree.branches, row, strict=True))
        )
        for tree, row in zip(trees, scores, strict=True)
    ]


def srpo_loss(
    policy: Policy, params: Mapping[str, Any], batch: TreeBatch, *, lambda_: float = 0.3, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SRPO loss of a batch, and statistics per question. Pure and differentiable in `params`.

    Args:
      policy: whose module to use.
      params: its parameters.
      batch: from `pack`.
      lambda_: weight of the contrastive term.
      **options: other options of `losses.srpo`.
    """
    model = nnx.merge(policy.graphdef, params)
    loss, aux = tree_loss(model, batch, LossConfig(options={"srpo": {"lambda_": lambda_, **options}}))
    return jnp.sum(loss * batch.weight) / jnp.sum(batch.weight), aux
