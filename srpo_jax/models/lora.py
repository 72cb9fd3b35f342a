"""Low-rank adapters (LoRA, Hu et al. 2022): made beside the kernels, and merged into them.

The adapter of the kernel [layers, in, out] at `layers/attention/q/kernel` is three parameters at `layers/attention/q`:
`lora_a` [layers, in, rank], `lora_b` [layers, rank, out] and the constant `lora_scale` [layers] = alpha / rank. Which kernels
have adapters, and of which rank, is told by the parameters alone; `policy.graph_definition` gives the modules that use them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.models.layers import wide
from srpo_jax.models.quantize import dequantised, is_constant
from srpo_jax.sharding import flatten, unflatten

Params = dict[str, Any]
PARTS = ("kernel_scale", "lora_a", "lora_b", "lora_scale")  # that a kernel may have beside it
UNADAPTED = "vision/patch_embed"  # a convolution in other libraries, whose adapters have another form


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get adapters, and of which size.

    Attributes:
      rank: of the adapters; 0 for none.
      alpha: adapters are scaled by alpha / rank.
      targets: regular expressions that are searched in the paths of linear maps, such as "layers/mlp/up" or
        "vision/blocks/attention/q"; the default are all of the decoder.

    Raises:
      ValueError: a negative rank, an alpha that is not positive, or no target.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("^layers/",)

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0 or not self.targets:
            raise ValueError(
                f"rank={self.rank}, alpha={self.alpha}, targets={self.targets}: use a rank of 0 (no adapters) or more, a "
                "positive alpha and at least one target"
            )

    def paths(self, kernels: Iterable[str]) -> list[str]:
        """The linear maps to adapt, of parameter paths that include their kernels.

        Raises:
          ValueError: a target that finds none; lists what there is.
        """
        maps = sorted(path.removesuffix("/kernel") for path in kernels if path.endswith("/kernel"))
        maps = [path for path in maps if path != UNADAPTED]
        for target in self.targets:
            if not any(re.search(target, path) for path in maps):
                raise ValueError(f"lora.targets: {target!r} matches no linear map; there are {', '.join(maps)}")
        return [path for path in maps if any(re.search(target, path) for target in self.targets)]


def init_adapters(params: Mapping[str, Any], config: LoraConfig, seed: int) -> Params:
    """Fresh adapters by path, float32, which leave the function as it is: `lora_b` is zero.

    `lora_a` is uniform in ±1/√in, as PEFT draws it; the numbers of a kernel depend on the seed and its path alone.

    Args:
      params: nested arrays or shapes of the base.
      config: with a positive rank.
      seed: of `lora_a`.
    """
    flat = flatten(params)
    adapters: Params = {}
    for path in config.paths(flat):
        *layers, inputs, outputs = flat[f"{path}/kernel"].shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        bound = inputs**-0.5
        shape = (*layers, inputs, config.rank)
        adapters[f"{path}/lora_a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        adapters[f"{path}/lora_b"] = jnp.zeros((*layers, config.rank, outputs), jnp.float32)
        adapters[f"{path}/lora_scale"] = jnp.full(layers, config.alpha / config.rank, jnp.float32)
    return adapters


def is_adapter(path: str) -> bool:
    """Whether `path` names a factor of an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))


def adapted_paths(flat: Iterable[str]) -> list[str]:
    """The linear maps that have adapters, of parameters by path."""
    return sorted(path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a"))


def merged(params: Mapping[str, Any], dtype: Any = None) -> Params:
    """The parameters of a plain model: adapters added to their kernels, int8 kernels in floating point.

    Sums are taken in float32 or wider. A head that is tied to the embedding stays so, because adapters are on kernels alone.

    Args:
      params: nested, with or without adapters and quantised kernels.
      dtype: of the result; None keeps each parameter's own, and takes that of the embedding for quantised ones.
    """
    flat = flatten(params)
    return unflatten({path: merged_part(flat, path, None, dtype) for path in plain_paths(flat)})


def plain_paths(flat: Iterable[str]) -> list[str]:
    """The parameters of the plain model among those by path: no adapters, no scales."""
    return [path for path in flat if not is_adapter(path) and not is_constant(path)]


def merged_dtype(flat: Mapping[str, Any], path: str, dtype: Any = None) -> jnp.dtype:
    """The dtype that the parameter at `path` has in `merged`."""
    own = flat[path].dtype
    return jnp.dtype(dtype or (own if jnp.issubdtype(own, jnp.floating) else flat["embed"].dtype))


def merged_part(flat: Mapping[str, Any], path: str, layer: int | None, dtype: Any = None) -> jax.Array:
    """The parameter at `path` of `merged`, or one layer of a stacked one, computed where the parameters are.

    Args:
      flat: parameters by path.
      path: one of `plain_paths`.
      layer: index along its first axis; None for all of it.
      dtype: see `merged`.
    """
    dtype = merged_dtype(flat, path, dtype)
    parts = [flat.get(path.removesuffix("kernel") + name) for name in PARTS] if path.endswith("kernel") else []
    if all(part is None for part in parts):
        return flat[path].astype(dtype) if layer is None else flat[path][layer].astype(dtype)
    return _merged_kernel((flat[path], *parts), layer, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _merged_kernel(parts: tuple[Any, ...], layer: int | None, dtype: jnp.dtype) -> jax.Array:
    if layer is not None:
        parts = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), parts)
    kernel, kernel_scale, lora_a, lora_b, lora_scale = parts
    if kernel_scale is not None:
        kernel = dequantised(kernel, kernel_scale)
    if lora_a is not None:
        delta = jnp.matmul(wide(lora_a), wide(lora_b), precision="highest")
        kernel = wide(kernel) + lora_scale[..., None, None] * delta
    return kernel.astype(dtype)
