"""An int8 base: kernels of the layers as int8 values and one float32 scale per layer and output channel.

Quantisation is symmetric and by rounding to the nearest: `kernel ≈ values * scale` with scale = max |kernel| / 127 over the
inputs of a channel, so no weight moves by more than half a scale. Embedding, head, norms, biases, patch embedding and
merger stay as they are: they hold little of the memory and much of the precision. Quantised parameters are frozen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from srpo_jax.models.layers import wide

LARGEST = 127
# Fixed numbers beside the parameters: they never train, and lose nothing to the dtype that a step computes in.
CONSTANTS = ("kernel_scale", "lora_scale")


def is_quantisable(path: str) -> bool:
    """Whether the parameter at `path` is a kernel of the decoder's or the vision tower's layers."""
    return re.search(r"^(layers|vision/blocks)/.*/kernel$", path) is not None


def is_constant(path: str) -> bool:
    """Whether `path` names a scale, which no update may move."""
    return path.endswith(CONSTANTS)


def quantise(path: str, kernel: jax.Array) -> dict[str, jax.Array]:
    """The two parameters that stand for a kernel: int8[..., in, out] at `path`, float32[..., out] beside it.

    The values are sharded like the kernel, the scales are on every device.
    """
    where = kernel.sharding
    whole = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
    values, scale = jax.jit(round_to_int8, out_shardings=(where, whole))(kernel)
    return {path: values, scale_path(path): scale}


def scale_path(path: str) -> str:
    """Where the scales of the kernel at `path` are kept."""
    return path.removesuffix("kernel") + "kernel_scale"


def round_to_int8(x: jax.Array, axis: int = -2) -> tuple[jax.Array, jax.Array]:
    """int8 values of `x`, and float32 scales without `axis`, over which the largest magnitude becomes 127.

    By default the inputs of a kernel float[..., in, out]: one scale per output channel.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0)  # nothing but zeros
    return jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale


def dequantised(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The kernel that int8 values and scales stand for, in float32 or wider."""
    return wide(values) * scale[..., None, :]


def compute_params(params: Mapping[str, Any], dtype: Any) -> Any:
    """What the model computes with: floating parameters in `dtype`, int8 kernels and all scales as they are.

    Args:
      params: nested, or flat by path.
      dtype: of activations.
    """

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating) and not is_constant(path[-1].key)
        return x.astype(dtype) if floating else x

    return jax.tree_util.tree_map_with_path(cast, params)
