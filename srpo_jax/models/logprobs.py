"""Per-token log-probs from hidden states, the one way the whole library computes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.models.layers import wide

CHUNK = 1024


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Logits of `hidden` float[..., D] under the output embedding `head` float[V, D], in float32 or wider."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=dtype)


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """log p(target) for every position, `chunk` positions at a time.

    The [positions, V] logits never exist as a whole: each chunk's are recomputed in the backward pass.

    Args:
      hidden: float[..., D], the final normed hidden state that predicts the target.
      head: float[V, D].
      targets: int32[...].
      chunk: positions per chunk.

    Returns:
      float32[...] (float64 if hidden is float64).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = flat.shape[0]
    chunk = min(chunk, count)
    missing = -count % chunk
    flat = jnp.pad(flat, ((0, missing), (0, 0))).reshape(-1, chunk, flat.shape[-1])
    wanted = jnp.pad(wanted, (0, missing)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = head_logits(args[0], head)
        return logprobs_of(logits, args[1])

    return jax.lax.map(one_chunk, (flat, wanted)).reshape(-1)[:count].reshape(targets.shape)


def logprobs_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target]: logits float[..., V], targets int32[...]; float32 or wider."""
    logits = wide(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.scipy.special.logsumexp(logits, axis=-1)
