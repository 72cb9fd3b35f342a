"""Attention of packed trees as one fused TPU kernel per buffer: tokamax's splash attention, its mask known at run time.

Blocks of the mask that nobody sees are skipped, forward and backward, and no scores are kept: the kernel has its own gradient.
The only file that imports it (a private path of tokamax; extra `tpu`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax import sharding
from srpo_jax.trees import Rows

BLOCK = 512
LANES = 128


def suits(rows: Rows) -> bool:
    """Whether the kernel is installed and can take buffers of this size."""
    return importlib.util.find_spec("tokamax") is not None and math.prod(rows.tokens.shape[1:]) % LANES == 0


def tree_attention(rows: Rows, *, interpret: bool = False) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """See `attention.tree_attention`. On a mesh (`jax.set_mesh`), each device runs its own buffers and heads.

    Args:
      rows: the packed trees; buffers of a multiple of 128 tokens.
      interpret: run the kernel on a CPU, slowly.

    Raises:
      ImportError: tokamax is not installed.
      ValueError: buffers of another size.
    """
    if math.prod(rows.tokens.shape[1:]) % LANES:
        raise ValueError(
            f"attention='splash' needs buffers of a multiple of {LANES} tokens, not {rows.tokens.shape[1:]}: make pack.row "
            f"a multiple of {LANES}, or use attention='xla'"
        )
    of_buffer = functools.partial(_kernel, interpret=interpret)
    kernels = sharding.per_batch_part(jax.vmap(of_buffer))(rows.segments, rows.limits, rows.context)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return sharding.per_batch_part(_run, heads=k.shape[-2])(kernels, q, k, v)

    return attend


def _run(kernels: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernels of the buffers of one device, on its heads."""

    def heads_first(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)

    out = []
    for g in range(q.shape[0]):
        kernel = jax.tree.map(lambda x, g=g: x[g], kernels)
        y = kernel(heads_first(q[g]) * q.shape[-1] ** -0.5, heads_first(k[g]), heads_first(v[g]))
        out.append(y.swapaxes(0, 1).reshape(q.shape[1:]))
    return jnp.stack(out)


def _kernel(segments: jax.Array, limits: jax.Array, context: jax.Array, interpret: bool) -> Any:
    """The kernel of one buffer, a pytree; arguments as in `Rows`, without the axis of buffers."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash

    size = math.gcd(segments.size, BLOCK)
    blocks = {f"block_{name}": size for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")}
    config = splash.SplashConfig(**blocks, interpret=interpret)
    return splash.make_dynamic_splash_mha(_seen(segments, limits, context), config=config)


def _seen(segments: jax.Array, limits: jax.Array, context: jax.Array) -> jax.Array:
    """bool[N R, N R]: which token of a buffer sees which."""
    row = segments.shape[-1]
    index = jnp.arange(segments.size)
    first = jnp.repeat(context[:, 0], row)[:, None] * row  # the trunk's first token: its rows are consecutive
    segment, limit = segments.reshape(-1, 1), limits.reshape(-1, 1)
    query, key = index[:, None], index[None, :]
    own = (query // row == key // row) & (segment == segment.T) & (key <= query)
    return own | ((key >= first) & (key < first + limit))
