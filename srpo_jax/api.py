"""The functions that `import srpo_jax as sx` offers beside those of the modules themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models import policy as policies
from srpo_jax.models.policy import Policy
from srpo_jax.runs import is_run, load_run
from srpo_jax.training.step import ComputeConfig, LossConfig
from srpo_jax.training.step import srpo_loss as question_losses
from srpo_jax.trees import PackConfig, ReasoningTree, TreeBatch, pack_trees


def load_policy(path: str | Path, **options: Any) -> Policy:
    """The policy in a Hugging Face folder, or of a training run's newest checkpoint; see `models.policy.load_policy`."""
    return load_run(path, **options)[0] if is_run(path) else policies.load_policy(path, **options)


def pack(trees: Sequence[ReasoningTree], policy: Policy | None = None, config: PackConfig | None = None) -> TreeBatch:
    """Trees as one batch; without a `config`, in the smallest shapes of a coarse ladder that hold them.

    `policy` is accepted for symmetry with the other functions; packing needs token ids only.
    """
    del policy
    return pack_trees(trees, config or _fitting(trees))[0]


def _fitting(trees: Sequence[ReasoningTree]) -> PackConfig:
    longest = max((len(b.tokens) for t in trees for b in t.branches), default=1)
    total = max(sum(len(b.tokens) for b in t.branches) for t in trees)
    row = policies.bucket(max(longest - 1, 1), 16)
    return PackConfig(
        trunk=(policies.bucket(max(len(t.trunk.encoded.tokens) for t in trees), 16),),
        path=(policies.bucket(max(len(t.trunk.path) for t in trees), 16),),
        rows=tuple(range(0, 2 * total // row + 2)),  # first-fit decreasing leaves at most one row in two half empty
        row=row,
        branches=(max(len(t.branches) for t in trees),),
        branch=(row + 1,),
    )


def srpo_loss(
    policy: Policy, params: Mapping[str, Any], batch: TreeBatch, *, lambda_: float = 0.3, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SRPO loss of a batch, and statistics per question. Pure and differentiable in `params`.

    Args:
      policy: whose module to use.
      params: its parameters.
      batch: from `pack`.
      lambda_: weight of the contrastive term.
      **options: other fields of `LossConfig`.
    """
    model = nnx.merge(policy.graphdef, params)
    loss, aux = question_losses(model, batch, LossConfig(lambda_=lambda_, **options), ComputeConfig())
    return jnp.sum(loss * batch.weight) / jnp.sum(batch.weight), aux
