"""The three building blocks that the decoder and the vision tower share.

Every block computes in the dtype of its input and casts its parameters to it, so the same module runs in bfloat16,
float32 and float64. Norms accumulate in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02  # Qwen's initializer_range
Remat = Literal["none", "selective", "full"]


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or wider if it is already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [in_features, out_features]; optionally quantised, optionally with a low-rank adapter.

    The optional parameters are not made here: `policy.graph_definition` gives them to the modules whose parameters have them.

    Attributes:
      kernel_scale: float32[out_features] where the kernel is int8: the product is scaled, no floating kernel is stored.
      lora_a: [in_features, rank]; with it `lora_b` [rank, out_features] and `lora_scale` []:
        y += lora_scale * (x @ lora_a) @ lora_b (Hu et al. 2022). The product of the two is never formed.
    """

    kernel_scale: Any = None
    lora_a: Any = None
    lora_b: Any
    lora_scale: Any

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kernel_scale is None:
            y = x @ self.kernel[...].astype(x.dtype)
        else:
            y = quantised_product(x, self.kernel[...], self.kernel_scale[...])
        if self.lora_a is not None:
            low = scaled(x @ self.lora_a[...].astype(x.dtype), self.lora_scale[...])
            y += low @ self.lora_b[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x * scale` in float32 or wider, in the dtype of `x`."""
    return (wide(x) * scale).astype(x.dtype)


@jax.custom_vjp
def quantised_product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """`x @ (kernel * scale)`: x float[..., in], kernel int8[in, out], scale float32[out]; differentiable in `x` alone."""
    return scaled(x @ kernel.astype(x.dtype), scale)


def _quantised_product_fwd(x: jax.Array, kernel: jax.Array, scale: jax.Array):
    return quantised_product(x, kernel, scale), (kernel, scale)  # kept in int8, not as the floating copy


def _quantised_product_bwd(kept: tuple[jax.Array, jax.Array], g: jax.Array):
    kernel, scale = kept
    return scaled(g, scale) @ kernel.astype(g.dtype).T, None, None


quantised_product.defvjp(_quantised_product_fwd, _quantised_product_bwd)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, *, eps: float, rngs: nnx.Rngs):
        del rngs  # the scale starts at one
        self.scale = nnx.Param(jnp.ones((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = wide(x)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return h.astype(x.dtype) * self.scale[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward block: `down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, features: int, hidden: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate = Linear(features, hidden, bias=bias, rngs=rngs)
        self.up = Linear(features, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, features, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding of `x` float[..., H, D] by `angles` float[..., D/2], halves convention (Su et al. 2021).

    The rotation happens in float32 or wider.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules as one, every parameter with a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of a scan over layers, with what it keeps of each layer for the backward pass.

    "none" keeps every intermediate, "full" nothing but the layer's input. "selective" keeps the products with kernels and
    computes the rest again: scores and softmax are the largest arrays of a layer (quadratic in the length) and norms,
    rotations and activations the cheapest, while the products hold nearly all the work (Korthikanti et al. 2022).

    Args:
      body: of `jax.lax.scan`.
      remat: one of the three.
    """
    if remat == "none":
        return body
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan forward and backward pass are separate loops: nothing that common subexpressions could merge.
    return jax.checkpoint(body, policy=products if remat == "selective" else None, prevent_cse=False)
