"""Attention over a sequence and over a comb, against a plain softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models import attention

B, N, Q, T, H, K, D = 2, 2, 5, 7, 4, 2, 8


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def plain(q, k, v, seen):
    """One query float[D] over keys float[S, D] that it sees."""
    scores = np.where(seen, k @ q / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ v


def comb_inputs(dtype):
    shapes = [(B, N, Q, H, D), (B, T, K, D), (B, T, K, D), (B, N, Q, K, D), (B, N, Q, K, D)]
    q, *kv = (jnp.asarray(random(*shape, seed=i, scale=2.0), dtype) for i, shape in enumerate(shapes))
    segments = np.asarray([[[0, 0, 1, 1, 1], [2, 2, 2, 2, -1]]] * B)
    limits = np.asarray([[[3, 3, 6, 6, 6], [7, 7, 7, 7, 0]]] * B)
    own = (segments[..., :, None] == segments[..., None, :]) & np.tri(Q, dtype=bool)
    return q, tuple(kv[:2]), tuple(kv[2:]), limits, own


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_comb_is_one_softmax_over_trunk_and_own_keys(dtype, bound):
    q, trunk, own, limits, mask = comb_inputs(dtype)
    ours = np.asarray(attention.attend_comb(q, trunk, own, limits, mask), np.float64)
    q, (tk, tv), (ok, ov) = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, trunk, own))
    for b, n, i, h in np.ndindex(B, N, Q, H):
        g = h // (H // K)
        keys, values = np.concatenate([tk[b, :, g], ok[b, n, :, g]]), np.concatenate([tv[b, :, g], ov[b, n, :, g]])
        seen = np.concatenate([np.arange(T) < limits[b, n, i], mask[b, n, i]])
        np.testing.assert_allclose(ours[b, n, i, h], plain(q[b, n, i, h], keys, values, seen), atol=bound * 4)


def test_scores_of_bfloat16_are_not_rounded_to_bfloat16():
    """Keys that differ by less than a bfloat16 step of their score still get different weights."""
    q = jnp.full((1, 1, 1, 64), 2.0, jnp.bfloat16)
    k = jnp.full((1, 2, 1, 64), 2.0, jnp.bfloat16).at[0, 1, 0, 0].set(2.5)  # scores 256/8 and 257/8
    v = jnp.stack([jnp.zeros(64), jnp.ones(64)])[None, :, None].astype(jnp.bfloat16)
    out = attention.attend(q, k, v, jnp.ones((1, 1, 2), bool))
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1 / 8)), abs=2e-3)


def test_decoding_is_the_last_row_of_a_comb():
    """One branch per row: the newest token's attention, from the decode cache and from the comb."""
    q, trunk, own, limits, _ = comb_inputs("float32")
    causal = np.broadcast_to(np.tri(Q, dtype=bool), (B, N, Q, Q))
    limits = np.broadcast_to(limits[..., :1], limits.shape)
    whole = attention.attend_comb(q, trunk, own, limits, causal)
    cache = attention.CombCache.start(trunk, N, Q)
    cache = cache._replace(own_k=jnp.moveaxis(own[0], 2, -1), own_v=jnp.moveaxis(own[1], 2, -2))
    for step in range(Q):
        one = attention.attend_decode(q[:, :, step], cache, limits[..., 0], jnp.int32(step))
        np.testing.assert_allclose(one, whole[:, :, step], atol=1e-5)
