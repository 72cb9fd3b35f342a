"""Per-token log-probs of whole trees: one image encode and one trunk forward per tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.models.layers import Remat
from srpo_jax.models.logprobs import CHUNK, token_logprobs
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.trees import TreeBatch


def tree_logprobs(
    model: Qwen2_5_VL, batch: TreeBatch, *, remat: Remat = "none", chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """log π of every token of the reference path and of every branch.

    Args:
      model: the policy's module.
      batch: packed trees.
      remat: what each layer keeps for the backward pass (see `layers.rematerialised`).
      chunk: positions per chunk of the log-prob head.

    Returns:
      float32[B, A] for path and reply, float32[B, M, L] for the branches; meaningless beyond their lengths.
    """
    features = model.encode_images(batch.trunk.vision, remat=remat)
    trunk, rows = model.comb(batch.trunk, batch.rows, features, remat=remat)
    size, path = batch.path_targets.shape
    before = batch.path_start[:, None] - 1 + jnp.arange(path)
    before = jnp.minimum(before, trunk.shape[1] - 1)  # padding reads the last token; its value is masked by the loss
    picked = jnp.take_along_axis(trunk, jnp.concatenate([before, batch.first], axis=1)[..., None], axis=1)
    hidden = jnp.concatenate([picked, rows.reshape(size, -1, rows.shape[-1])], axis=1)
    targets = jnp.concatenate([batch.path_targets, batch.targets], axis=1)
    scores = token_logprobs(hidden, model.output_embedding, targets, chunk)
    of_path, of_branches = scores[:, :path], scores[:, path:]
    return of_path, jnp.take_along_axis(of_branches, batch.slots.reshape(size, -1), axis=1).reshape(batch.slots.shape)
