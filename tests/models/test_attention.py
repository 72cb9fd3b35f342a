"""Attention over a sequence and over a comb, against a plain softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models import attention, decoding
from srpo_jax.models.quantize import round_to_int8
from srpo_jax.trees import Rows

B, N, R, T, H, K, D = 2, 4, 5, 7, 4, 2, 8


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def plain(q, k, v, seen):
    """One query float[D] over keys float[S, D] that it sees."""
    scores = np.where(seen, k @ q / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ v


def tree_inputs(dtype):
    """Two buffers of a trunk of seven tokens in rows 0 and 1, and branches at 3, 6 and 7; one row is padding."""
    segments = np.asarray([[[0, 0, 0, 0, 0], [0, 0, 1, 1, -1], [2, 2, 3, 3, 3], [-1] * 5]] * B)
    limits = np.asarray([[[0] * 5, [5, 5, 3, 3, 0], [6, 6, 7, 7, 7], [0] * 5]] * B)
    context = np.asarray([[[0, 1]] * 3 + [[0, 0]]] * B)
    empty = np.zeros((B, N, R), np.int32)
    rows = Rows(empty, empty, empty, segments, limits, context)
    shapes = [(B, N, R, H, D), (B, N, R, K, D), (B, N, R, K, D)]
    return [jnp.asarray(random(*shape, seed=i, scale=2.0), dtype) for i, shape in enumerate(shapes)], rows


def seen_keys(rows):
    """bool[B, N R, N R] by the definition, token by token."""
    seen = np.zeros((B, N * R, N * R), bool)
    for b, n, r in np.ndindex(B, N, R):
        for t in range(rows.limits[b, n, r]):
            seen[b, n * R + r, rows.context[b, n, t // R] * R + t % R] = True
        for s in range(r + 1):
            seen[b, n * R + r, n * R + s] |= rows.segments[b, n, s] == rows.segments[b, n, r]
    return seen


@pytest.mark.parametrize("score_bytes", [1 << 20, 1])  # all rows at once, row by row
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_packed_trees_are_one_softmax_over_what_each_token_sees(dtype, bound, score_bytes, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    (q, k, v), rows = tree_inputs(dtype)
    ours = np.asarray(attention.tree_attention(rows)(q, k, v), np.float64).reshape(B, N * R, H, D)
    q, k, v = (np.asarray(x, np.float64).reshape(B, N * R, -1, D) for x in (q, k, v))
    seen = seen_keys(rows)
    for b, i, h in np.ndindex(B, N * R, H):
        g = h // (H // K)
        np.testing.assert_allclose(ours[b, i, h], plain(q[b, i, h], k[b, :, g], v[b, :, g], seen[b, i]), atol=bound * 4)


def test_gradients_do_not_depend_on_how_many_rows_are_done_at_a_time(monkeypatch):
    args, rows = tree_inputs("float32")
    weights = random(B, N, R, H, D, seed=9)

    def gradients(score_bytes):
        monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
        return jax.grad(lambda a: jnp.sum(attention.tree_attention(rows)(*a) * weights))(args)

    for a, b in zip(gradients(1 << 20), gradients(1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_queries_in_chunks_are_those_at_once(monkeypatch):
    q, k, v = (jnp.asarray(random(2, 7, heads, D, seed=i), jnp.float32) for i, heads in enumerate((H, K, K)))
    mask = attention.causal_mask(jnp.asarray([7, 4]), 7)

    def run(score_bytes):
        monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
        return jax.value_and_grad(lambda a: jnp.sum(jnp.sin(attention.attend(*a, mask))))((q, k, v))

    whole, gradients = run(1 << 20)
    for size in (1, 600):
        parts, others = run(size)
        np.testing.assert_allclose(parts, whole, rtol=1e-6)
        for a, b in zip(gradients, others, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_scores_of_bfloat16_are_not_rounded_to_bfloat16():
    """Keys that differ by less than a bfloat16 step of their score still get different weights."""
    q = jnp.full((1, 1, 1, 64), 2.0, jnp.bfloat16)
    k = jnp.full((1, 2, 1, 64), 2.0, jnp.bfloat16).at[0, 1, 0, 0].set(2.5)  # scores 256/8 and 257/8
    v = jnp.stack([jnp.zeros(64), jnp.ones(64)])[None, :, None].astype(jnp.bfloat16)
    out = attention.attend(q, k, v, jnp.ones((1, 1, 2), bool))
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1 / 8)), abs=2e-3)


def test_decoding_is_the_last_row_of_a_comb():
    """One branch per row, each at a step of its own: the newest token, from the decode cache and from the packed tree."""
    (q, k, v), rows = tree_inputs("float32")
    limits = np.asarray([[0, 5, 6, 7]] * B)  # the trunk's rows come first; row 3 is a branch, too
    context = np.broadcast_to([0, 1], (B, N, 2))
    rows = rows._replace(segments=np.ones((B, N, R), int), limits=np.repeat(limits[..., None], R, -1), context=context)
    whole = attention.tree_attention(rows)(q, k, v)
    trunk = tuple(x[:, :2].reshape(B, 2 * R, K, D)[:, :T] for x in (k, v))
    kept = decoding.KVCache.of(*trunk, int8=False)
    nothing = jnp.full((1, B, N, R, K, D), np.nan)
    cache, layer = decoding.KVCache.of(nothing, nothing, int8=False), jnp.int32(0)
    at = lambda x, steps: jnp.take_along_axis(x, steps[:, :, None, None, None], axis=2)[:, :, 0]  # noqa: E731
    for step in range(R + B * N - 1):
        steps = np.clip(step - np.arange(B * N).reshape(B, N), 0, R - 1)  # they start one after the other
        cache = cache.write(at(k, steps), at(v, steps), jnp.asarray(steps), layer)
        # What is not written yet is garbage, which must not be seen.
        seen = cache._replace(values=jnp.nan_to_num(cache.values), keys=jnp.nan_to_num(cache.keys, nan=1e30))
        one = decoding.attend_decode(at(q, steps), kept, seen.layer(layer), limits, jnp.asarray(steps))
        np.testing.assert_allclose(one, at(whole, steps), atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_int8_keys_and_values_keep_two_digits_at_any_size(size):
    """Half a step of 127 on every entry; scales are per token and head, so sizes of tokens do not matter."""
    x = jnp.asarray(random(B, T, K, D, scale=size))
    whole, scale = round_to_int8(x, axis=-1)
    assert whole.dtype == jnp.int8
    np.testing.assert_allclose(whole * scale[..., None], x, atol=float(jnp.abs(x).max()) / 254 * 1.001)
    assert jax.tree.leaves(round_to_int8(jnp.zeros((2, D)), axis=-1))[0].tolist() == [[0] * D] * 2


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program makes, its inner programs included."""
    found = max((x.aval.size for e in jaxpr.eqns for x in e.outvars if hasattr(x.aval, "size")), default=0)
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found = max(found, largest_array(inner) if hasattr(inner, "eqns") else 0)
    return found


def test_no_array_of_all_tokens_by_all_tokens_exists_in_what_a_gpu_runs(monkeypatch):
    """Forward and backward pass of 7,680 tokens with 16 query and 2 key/value heads, also lowered for CUDA."""
    n, r = 30, 256
    tokens = jax.ShapeDtypeStruct((1, n, r), jnp.int32)
    rows = Rows(tokens, tokens, tokens, tokens, tokens, jax.ShapeDtypeStruct((1, n, 6), jnp.int32))
    qkv = tuple(jax.ShapeDtypeStruct((1, n, r, heads, 128), jnp.bfloat16) for heads in (16, 2, 2))

    def gradient(qkv, rows):
        return jax.grad(lambda a: jnp.sum(attention.tree_attention(rows)(*a).astype(jnp.float32) ** 2))(qkv)

    assert largest_array(jax.make_jaxpr(gradient)(qkv, rows).jaxpr) < (n * r) ** 2 / 2
    exported = jax.export.export(jax.jit(gradient), platforms=["cuda"])(qkv, rows)
    assert exported.platforms == ("cuda",) and f"{n * r}x{n * r}" not in exported.mlir_module()
    monkeypatch.setattr(attention, "SCORE_BYTES", 1 << 40)  # all rows at once: the check would see it
    assert largest_array(jax.make_jaxpr(lambda *a: gradient(*a))(qkv, rows).jaxpr) > (n * r) ** 2
