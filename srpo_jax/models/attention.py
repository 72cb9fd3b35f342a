"""Attention over a sequence, and over a comb.

Both are grouped-query attention with scores and softmax in float32 or wider. Shapes: `B` batch, `Q` queries, `S` keys, `H`
query heads, `K` key/value heads (H a multiple of K), `D` head size.

A comb is a trunk and rows of branches that start at prefixes of it. A branch's query attends to the trunk's keys below its
own `limit` (the prefix length) and to the earlier tokens of the same branch. With a trunk of five tokens and one row that
packs branch a (prefix 2, tokens a1 a2) and branch b (prefix 4, token b1), the scores kept are

               trunk        row
             1 2 3 4 5   a1 a2 b1
        a1   x x . . .   x  .  .
        a2   x x . . .   x  x  .
        b1   x x x x .   .  .  x
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.models.layers import wide


def causal_mask(lengths: jax.Array, size: int) -> jax.Array:
    """bool[B, size, size]: query q sees key k iff k <= q and k is valid; padded queries see themselves too."""
    index = jnp.arange(size)
    valid = index[None, None, :] < lengths[:, None, None]
    return (index[None, :] <= index[:, None])[None] & (valid | (index[None, :] == index[:, None])[None])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention.

    Args:
      q: float[B, Q, H, D].
      k: float[B, S, K, D].
      v: float[B, S, K, D].
      mask: bool[B, Q, S], True where the query sees the key; every query must see at least one.

    Returns:
      float[B, Q, H, D].
    """
    b, queries, heads, size = q.shape
    grouped = q.reshape(b, queries, k.shape[2], -1, size)
    scores = _masked(jnp.einsum("bqkgd,bskd->bkgqs", grouped, k), size, mask[:, None, None])
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(b, queries, heads, size)


def attend_comb(
    q: jax.Array,
    trunk: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    limits: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    """Attention of branch tokens: one softmax over the shared trunk's keys and the row's own keys.

    The trunk's keys are used in place, once per tree and key/value head, for all rows at once. The two parts share one
    normaliser that is computed here, so gradients flow through it (merging two finished attentions by their log-sum-exp
    would lose them).

    Args:
      q: float[B, N, Q, H, D], the queries of N rows.
      trunk: keys and values float[B, T, K, D].
      own: keys and values float[B, N, R, K, D] of the same rows.
      limits: int32[B, N, Q], trunk tokens that the query sees.
      own_mask: bool[B, N, Q, R], True where the query sees the row's key; every query must see at least one.

    Returns:
      float[B, N, Q, H, D].
    """
    (trunk_k, trunk_v), (own_k, own_v) = trunk, own
    b, rows, queries, heads, size = q.shape
    grouped = q.reshape(b, rows, queries, trunk_k.shape[2], -1, size)
    seen = jnp.arange(trunk_k.shape[1]) < limits[..., None]
    on_trunk = _masked(jnp.einsum("bnqkgd,btkd->bkgnqt", grouped, trunk_k), size, seen[:, None, None])
    on_own = _masked(jnp.einsum("bnqkgd,bnskd->bkgnqs", grouped, own_k), size, own_mask[:, None, None])
    peak = jnp.maximum(on_trunk.max(-1, keepdims=True), on_own.max(-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    on_trunk, on_own = jnp.exp(on_trunk - peak), jnp.exp(on_own - peak)
    total = on_trunk.sum(-1, keepdims=True) + on_own.sum(-1, keepdims=True)
    out = jnp.einsum("bkgnqt,btkd->bnqkgd", (on_trunk / total).astype(trunk_v.dtype), trunk_v)
    out += jnp.einsum("bkgnqs,bnskd->bnqkgd", (on_own / total).astype(own_v.dtype), own_v)
    return out.reshape(b, rows, queries, heads, size)


def _masked(scores: jax.Array, head_size: int, mask: jax.Array) -> jax.Array:
    scores = wide(scores) * head_size**-0.5
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
