"""The decode cache of a comb, and attention of one new token of every branch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from srpo_jax.models.attention import joint_weights, scaled_scores, weighted_values
from srpo_jax.models.quantize import round_to_int8


class KVCache(NamedTuple):
    """Keys and values that decoding reads, laid out so that every product of a step reads memory in order.

    Attributes:
      keys: [..., K, D, S], in the policy's dtype, a wider one, or int8.
      values: [..., K, S, D].
      key_scales: float32[..., K, S], what one unit of an int8 key is worth; None for unquantised keys.
      value_scales: float32[..., K, S].
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @staticmethod
    def of(k: jax.Array, v: jax.Array, int8: bool) -> KVCache:
        """A cache that holds k and v float[..., S, K, D]."""
        k, v = jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)
        if not int8:
            return KVCache(jnp.swapaxes(k, -1, -2), v)
        (k, k_scale), (v, v_scale) = round_to_int8(k, axis=-1), round_to_int8(v, axis=-1)
        return KVCache(jnp.swapaxes(k, -1, -2), v, k_scale, v_scale)

    def layer(self, index: jax.Array) -> KVCache:
        """One layer of a cache with a leading layer axis."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), self)

    def write(self, k: jax.Array, v: jax.Array, steps: jax.Array, layer: jax.Array) -> KVCache:
        """Puts k and v float[B, M, K, D] at position steps int32[B, M] of every branch, into `layer` of a stacked cache."""
        one = KVCache.of(k[..., None, :, :], v[..., None, :, :], self.key_scales is not None)
        keys = _put(self.keys, one.keys[..., 0], layer, steps, 5)
        values = _put(self.values, one.values[..., 0, :], layer, steps, 4)
        scales = jax.tree.map(lambda old, new: _put(old, new[..., 0], layer, steps, 4), self[2:], one[2:])
        return KVCache(keys, values, *scales)


def _put(old: jax.Array, new: jax.Array, layer: jax.Array, steps: jax.Array, axis: int) -> jax.Array:
    """`old` [layers, B, M, ...] with `new` [B, M, ...] in one layer at index `steps` [B, M] of `axis`.

    Written with batch axes, of which the partitioner knows that no device needs another's. Of indices it does not.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)),
        inserted_window_dims=(0, axis),
        scatter_dims_to_operand_dims=(0, axis),
        operand_batching_dims=(1, 2),
        scatter_indices_batching_dims=(0, 1),
    )
    indices = jnp.stack([jnp.broadcast_to(layer, steps.shape), steps], axis=-1)
    return jax.lax.scatter(old, indices, new.astype(old.dtype), numbers, unique_indices=True, mode="clip")


class CombCache(NamedTuple):
    """What a decoding comb keeps.

    Attributes:
      trunk: of the trunks [..., B], shared by a tree's branches and never copied.
      own: of each branch's own tokens [..., B, M].
    """

    trunk: KVCache
    own: KVCache


def attend_decode(q: jax.Array, trunk: KVCache, own: KVCache, limits: jax.Array, steps: jax.Array) -> jax.Array:
    """Attention to trunk and own keys, for one new token of every branch, at position `steps` of its own keys.

    Args:
      q: float[B, M, H, D].
      trunk: [B], of one layer.
      own: [B, M], of one layer, the new token's key and value included.
      limits: int32[B, M], trunk tokens that each branch sees.
      steps: int32[B, M].

    Returns:
      float[B, M, H, D].
    """
    b, m, heads, size = q.shape
    grouped = q.reshape(b, m, trunk.keys.shape[1], -1, size)
    seen = jnp.arange(trunk.keys.shape[-1]) < limits[..., None]
    written = jnp.arange(own.keys.shape[-1]) <= steps[..., None]
    on_trunk = _cached_scores("bmkgd,bkds->bkmgs", grouped, trunk, seen[:, None, :, None])
    # Products in the cache's own order of axes: the scores are turned around, which are small, not the keys.
    on_own = jnp.swapaxes(_cached_scores("bmkgd,bmkds->bmkgs", grouped, own, written[:, :, None, None]), 1, 2)
    (on_trunk, on_own), total = joint_weights(on_trunk, on_own, to="bkmg->bmkg")
    out = _cached_values("bkmgs,bksd->bmkgd", on_trunk, trunk, q.dtype)
    out += _cached_values("bmkgs,bmksd->bmkgd", jnp.swapaxes(on_own, 1, 2), own, q.dtype)
    return (out / total).astype(q.dtype).reshape(b, m, heads, size)


def _cached_scores(products: str, q: jax.Array, cache: KVCache, mask: jax.Array) -> jax.Array:
    """`scaled_scores` of cached keys; the keys' scales are applied to the products."""
    if cache.key_scales is None:
        return scaled_scores(products, q, cache.keys, mask)
    scores = scaled_scores(products, q, cache.keys.astype(q.dtype), jnp.bool_(True))
    return jnp.where(mask, scores * _per_head(cache.key_scales), jnp.finfo(scores.dtype).min)


def _cached_values(products: str, weights: jax.Array, cache: KVCache, dtype: jnp.dtype) -> jax.Array:
    """Sum of cached values under `weights`; the values' scales are applied to the weights."""
    if cache.value_scales is None:
        return weighted_values(products, weights.astype(dtype), cache.values)
    weights = weights * _per_head(cache.value_scales)
    # Not added up in float32: XLA's CPU backend lacks that product of two 16-bit arrays for these shapes.
    return jnp.einsum(products, weights.astype(dtype), cache.values.astype(dtype))


def _per_head(scales: jax.Array) -> jax.Array:
    """Scales of a trunk [B, K, S] as factors of [B, K, M, G, S], those of branches [B, M, K, S] of [B, M, K, G, S]."""
    return scales[:, :, None, None] if scales.ndim == 3 else scales[:, :, :, None]
