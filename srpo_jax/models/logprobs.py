"""Per-token log-probs from hidden states, the one way the whole library computes them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from srpo_jax import sharding
from srpo_jax.models.layers import wide

CHUNK = 1024


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Logits of `hidden` float[..., D] under the output embedding `head` float[V, D], in float32 or wider."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=dtype)


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """log p(target) for every position, `chunk` positions at a time.

    The [positions, V] logits never exist as a whole: each chunk's are recomputed in the backward pass. (Skipping chunks
    without any target by a conditional would cost a gigabyte on a TPU: its gradient copies the head.) On a mesh each device
    takes its own rows through its own chunks, with the head gathered before the first and its gradient reduced after the last.

    Args:
      hidden: float[..., n, D], the final normed hidden state that predicts the target.
      head: float[V, D].
      targets: int32[..., n]; negative where there is none.
      chunk: positions of each row per chunk.

    Returns:
      float32[..., n] (float64 if hidden is float64), 0 where there is no target.
    """
    some = functools.partial(_in_chunks, chunk=chunk)
    return sharding.with_gathered(some, "head", head.astype(hidden.dtype))(hidden, targets)


def _in_chunks(head: jax.Array, hidden: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    *lead, count = targets.shape
    steps = max(1, -(-count // chunk))
    chunk = -(-count // steps)
    axis, wanted = len(lead), jnp.maximum(targets, 0)

    def split(x: jax.Array) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, steps * chunk - count)
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], steps, chunk, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def one_chunk(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = args
        rows = hidden.reshape(-1, hidden.shape[-1])  # a TPU keeps the logits twice if they have more axes
        return logprobs_of(head_logits(rows, head), targets.reshape(-1)).reshape(targets.shape)

    scores = jax.lax.map(one_chunk, (split(hidden), split(wanted)))
    scores = jnp.moveaxis(scores, 0, axis).reshape(*lead, steps * chunk)[..., :count]
    return jnp.where(targets >= 0, scores, 0)


def logprobs_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target]: logits float[..., V], targets int32[...]; float32 or wider."""
    logits = wide(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.scipy.special.logsumexp(logits, axis=-1)
