"""Per-token log-probs of whole trees: one image encode and one trunk forward per tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.models.layers import Remat
from srpo_jax.models.logprobs import CHUNK, token_logprobs
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.trees import TreeBatch


def tree_logprobs(
    model: Qwen2_5_VL, batch: TreeBatch, *, remat: Remat = "none", chunk: int = CHUNK, attention: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """log π of every token of the reference path and of every branch.

    Args:
      model: the policy's module.
      batch: packed trees.
      remat: what each layer keeps for the backward pass (see `layers.rematerialised`).
      chunk: positions of a buffer per chunk of the log-prob head.
      attention: backend, see `models.attention.tree_attention`.

    Returns:
      float32[B, A] for path and reply, float32[B, M, L] for the branches; meaningless beyond their lengths.
    """
    features = model.encode_images(batch.vision, remat=remat)
    hidden = model.comb(batch.rows, features, remat=remat, backend=attention)
    buffers = hidden.shape[0]
    hidden = hidden.reshape(buffers, -1, hidden.shape[-1])
    picked = jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
    scores = token_logprobs(picked, model.output_embedding, batch.targets, chunk)

    def of(slots: jax.Array, length: int) -> jax.Array:
        at = jnp.minimum(slots[..., None] + jnp.arange(length), scores.shape[1] - 1)
        return jnp.take_along_axis(scores, at.reshape(buffers, -1), axis=1).reshape(at.shape)

    return of(batch.path_slots, batch.path_targets.shape[1]), of(batch.branch_slots, batch.tokens.shape[2])
