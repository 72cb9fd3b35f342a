"""Attention over a sequence, over packed trees, and over a comb that is being decoded.

Both are grouped-query attention with scores and softmax in float32 or wider. Shapes: `B` batch, `Q` queries, `S` keys, `H`
query heads, `K` key/value heads (H a multiple of K), `D` head size.

Packed trees lie in rows (`trees.Rows`): a token attends to the trunk's tokens below its own `limit` and to the tokens up to
itself of its own segment. With a trunk of five tokens in rows of four, branch a (prefix 2, tokens a1 a2) and branch b (prefix
4, token b1), the scores kept are

             row 0         row 1
            1 2 3 4     5 a1 a2 b1
       1    x . . .
       2    x x . .
       3    x x x .
       4    x x x x
       5    x x x x     x  .  .  .
       a1   x x . .     .  x  .  .
       a2   x x . .     .  x  x  .
       b1   x x x x     .  .  .  x
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.models import splash
from srpo_jax.trees import Rows

KeyValues = tuple[jax.Array, jax.Array]
SCORE_BYTES = 32 << 20
"""Memory of each buffer's (or batch's) scores that are computed at a time, if one query or row of queries fits."""


def causal_mask(lengths: jax.Array, size: int) -> jax.Array:
    """bool[B, size, size]: query q sees key k iff k <= q and k is valid; padded queries see themselves too."""
    index = jnp.arange(size)
    valid = index[None, None, :] < lengths[:, None, None]
    return (index[None, :] <= index[:, None])[None] & (valid | (index[None, :] == index[:, None])[None])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention, several queries at a time where the scores of all would take more than `SCORE_BYTES`.

    Args:
      q: float[B, Q, H, D].
      k: float[B, S, K, D].
      v: float[B, S, K, D].
      mask: bool[B, Q, S], True where the query sees the key; every query must see at least one.

    Returns:
      float[B, Q, H, D].
    """

    def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, mask = part
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = scaled_scores("bqkgd,bskd->bkgqs", grouped, k, mask[:, None, None])
        [weights], total = joint_weights(scores, to="bkgq->bqkg")
        out = weighted_values("bkgqs,bskd->bqkgd", weights.astype(v.dtype), v)
        return (out / total).astype(q.dtype).reshape(q.shape)

    return _in_chunks(some, (q, mask), 4 * q.shape[0] * q.shape[2] * k.shape[1])


def _in_chunks(some: Callable[[Any], jax.Array], parts: tuple[jax.Array, ...], score_bytes: int) -> jax.Array:
    """`some(parts)`, over chunks of the parts' axis 1 whose scores, `score_bytes` per index, take `SCORE_BYTES` or one index.

    Where that is not all of it, scores are recomputed in the backward pass. The last chunk is padded with zeros.
    """
    count = parts[0].shape[1]
    steps = max(1, -(-count // max(1, SCORE_BYTES // score_bytes)))
    if steps == 1:
        return some(parts)
    each = -(-count // steps)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, steps * each - count), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], steps, each, *x.shape[2:]), 1, 0)

    y = jax.lax.map(jax.checkpoint(some), tuple(split(jnp.asarray(x)) for x in parts))
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :count]


BACKENDS = ("auto", "xla", "splash")


def tree_attention(rows: Rows, backend: str = "auto") -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The attention of packed trees, as a function of queries float[G, N, R, H, D], keys and values float[G, N, R, K, D].

    What it needs of `rows` is made once, for all layers.

    Args:
      rows: the packed trees.
      backend: "xla", everywhere, the reference; "splash", a fused kernel for TPUs that skips what nobody sees (extra `tpu`);
        "auto", the kernel on a TPU if it is installed and can take the rows.

    Raises:
      ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r}: use one of {', '.join(map(repr, BACKENDS))}")
    if backend == "splash" or (backend == "auto" and jax.default_backend() == "tpu" and splash.suits(rows)):
        return splash.tree_attention(rows)
    return functools.partial(attend_tree, rows=rows)


def attend_tree(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> jax.Array:
    """Attention of packed trees in XLA: for each row one softmax over its trunk's keys and its own, several rows at a time.

    The two parts share one normaliser through which gradients flow (merging two finished attentions by their log-sum-exp would
    lose them).

    Args:
      q: float[G, N, R, H, D].
      k: float[G, N, R, K, D].
      v: float[G, N, R, K, D].
      rows: structure of the N rows.

    Returns:
      float[G, N, R, H, D].
    """

    def some(part: tuple[jax.Array, ...]) -> jax.Array:
        q, own_k, own_v, segments, limits, context = part
        return _attend_rows(q, (own_k, own_v), (_gather(k, context), _gather(v, context)), limits, segments)

    row, heads = q.shape[2:4]
    parts = (q, k, v, rows.segments, rows.limits, rows.context)
    return _in_chunks(some, parts, 4 * heads * row * (rows.context.shape[-1] + 1) * row)


def _gather(x: jax.Array, context: jax.Array) -> jax.Array:
    """float[G, n, W R, K, D], the rows `context` int32[G, n, W] of `x` float[G, N, R, K, D] end to end."""
    picked = jax.vmap(lambda one, index: one[index])(x, jnp.asarray(context))
    return picked.reshape(*picked.shape[:2], -1, *picked.shape[4:])


def _attend_rows(q: jax.Array, own: KeyValues, trunk: KeyValues, limits: jax.Array, segments: jax.Array) -> jax.Array:
    """Rows of queries over the keys of their trunks below `limits` and the earlier ones of their own segment.

    Args:
      q: float[G, N, R, H, D].
      own: float[G, N, R, K, D].
      trunk: float[G, N, T, K, D].
      limits: int32[G, N, R].
      segments: int32[G, N, R].
    """
    (own_k, own_v), (trunk_k, trunk_v) = own, trunk
    grouped = q.reshape(*q.shape[:3], own_k.shape[3], -1, q.shape[-1])
    index = jnp.arange(q.shape[2])
    same = (segments[..., :, None] == segments[..., None, :]) & (index[None, :] <= index[:, None])
    seen = jnp.arange(trunk_k.shape[2]) < limits[..., None]
    products = "gnqkhd,gnskd->gnkhqs"
    on_own = scaled_scores(products, grouped, own_k, same[:, :, None, None])
    on_trunk = scaled_scores(products, grouped, trunk_k, seen[:, :, None, None])
    (on_own, on_trunk), total = joint_weights(on_own, on_trunk, to="gnkhq->gnqkh")
    out = weighted_values("gnkhqs,gnskd->gnqkhd", on_own.astype(own_v.dtype), own_v)
    out += weighted_values("gnkhqs,gnskd->gnqkhd", on_trunk.astype(trunk_v.dtype), trunk_v)
    return (out / total).astype(q.dtype).reshape(q.shape)


def joint_weights(*scores: jax.Array, to: str) -> tuple[list[jax.Array], jax.Array]:
    """Softmax over the last axes of all `scores` together, before it is normalised.

    Dividing the means of values by the total, instead of each weight, spares forward and backward pass their way through
    arrays as large as the scores.

    Args:
      scores: float[..., S] each.
      to: the order of axes of the means of values, such as "bkgq->bqkg".

    Returns:
      Weights in [0, 1], one array of them for each of scores, and their total in that order, with a last axis of 1.
    """
    peak = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - jax.lax.stop_gradient(peak)) for x in scores]
    total = functools.reduce(jnp.add, [x.sum(-1) for x in weights])
    return weights, jnp.einsum(to, total)[..., None]


def weighted_values(products: str, weights: jax.Array, v: jax.Array) -> jax.Array:
    """Weighted sums of values in float32 or wider: two parts of one softmax are added before they are rounded."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    return jnp.einsum(products, weights, v, preferred_element_type=dtype)


def scaled_scores(products: str, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled scores, accumulated and kept in float32 or wider; the lowest number where masked."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(products, q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    return jnp.where(mask, scores, jnp.finfo(dtype).min)
