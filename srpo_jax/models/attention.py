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

from typing import NamedTuple

import jax
import jax.numpy as jnp

KeyValues = tuple[jax.Array, jax.Array]


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
    scores = _scores("bqkgd,bskd->bkgqs", grouped, k, mask[:, None, None])
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
    on_trunk = _scores("bnqkgd,btkd->bkgnqt", grouped, trunk_k, seen[:, None, None])
    on_own = _scores("bnqkgd,bnskd->bkgnqs", grouped, own_k, own_mask[:, None, None])
    on_trunk, on_own = _joint_softmax(on_trunk, on_own)
    out = jnp.einsum("bkgnqt,btkd->bnqkgd", on_trunk.astype(trunk_v.dtype), trunk_v)
    out += jnp.einsum("bkgnqs,bnskd->bnqkgd", on_own.astype(own_v.dtype), own_v)
    return out.reshape(b, rows, queries, heads, size)


class CombCache(NamedTuple):
    """Keys and values while decoding over a comb, laid out so that every product of a step reads memory in order.

    Attributes:
      trunk_k: float[..., B, K, D, T], keys of the trunks, shared by a tree's branches and never copied.
      trunk_v: float[..., B, K, T, D].
      own_k: float[..., B, M, K, D, R], keys of each branch's own tokens.
      own_v: float[..., B, M, K, R, D].
    """

    trunk_k: jax.Array
    trunk_v: jax.Array
    own_k: jax.Array
    own_v: jax.Array

    @staticmethod
    def start(trunk_kv: KeyValues, branches: int, budget: int) -> CombCache:
        """An empty cache for `branches` branches of at most `budget` tokens over prefilled trunks float[..., B, T, K, D]."""
        k, v = trunk_kv
        *lead, _, heads, size = k.shape
        return CombCache(
            trunk_k=jnp.moveaxis(k, -3, -1),
            trunk_v=jnp.moveaxis(v, -3, -2),
            own_k=jnp.zeros((*lead, branches, heads, size, budget), k.dtype),
            own_v=jnp.zeros((*lead, branches, heads, budget, size), v.dtype),
        )


def attend_decode(q: jax.Array, cache: CombCache, limits: jax.Array, step: jax.Array) -> jax.Array:
    """`attend_comb` for one new token of every branch, at position `step` of its own keys.

    Args:
      q: float[B, M, H, D].
      cache: of one layer, the new token's key and value included.
      limits: int32[B, M], trunk tokens that each branch sees.
      step: int32 scalar.

    Returns:
      float[B, M, H, D].
    """
    b, m, heads, size = q.shape
    grouped = q.reshape(b, m, cache.trunk_k.shape[1], -1, size)
    seen = jnp.arange(cache.trunk_k.shape[-1]) < limits[..., None]
    on_trunk = _scores("bmkgd,bkdt->bkmgt", grouped, cache.trunk_k, seen[:, None, :, None])
    on_own = _scores("bmkgd,bmkds->bkmgs", grouped, cache.own_k, jnp.arange(cache.own_k.shape[-1]) <= step)
    on_trunk, on_own = _joint_softmax(on_trunk, on_own)
    out = jnp.einsum("bkmgt,bktd->bmkgd", on_trunk.astype(q.dtype), cache.trunk_v)
    out += jnp.einsum("bkmgs,bmksd->bmkgd", on_own.astype(q.dtype), cache.own_v)
    return out.reshape(b, m, heads, size)


def _joint_softmax(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axes of `a` and `b` together."""
    peak = jax.lax.stop_gradient(jnp.maximum(a.max(-1, keepdims=True), b.max(-1, keepdims=True)))
    a, b = jnp.exp(a - peak), jnp.exp(b - peak)
    total = a.sum(-1, keepdims=True) + b.sum(-1, keepdims=True)
    return a / total, b / total


def _scores(products: str, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled scores, accumulated and kept in float32 or wider; the lowest number where masked."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(products, q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    return jnp.where(mask, scores, jnp.finfo(dtype).min)
