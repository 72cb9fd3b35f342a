"""The mesh, and the one table from parameter paths to mesh axes. Nobody else knows axis names.

Three axes: `data` replicates parameters, `fsdp` shards them and the batch, `tensor` splits heads, hidden units and the
vocabulary. Batches are split over `data` and `fsdp` together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Path pattern -> mesh axes of the trailing dimensions; a leading layer axis is never split. Reasons:
# - kernels into heads or hidden units split their outputs over `tensor`, kernels out of them their inputs, so that a block
#   needs one reduction; the other dimension goes over `fsdp`;
# - embedding and head split the vocabulary over `tensor`: the log-prob head reduces over it, chunk by chunk;
# - an adapter follows the two sides of its kernel; its rank is too small to split;
# - norms, biases and scales are small: replicated;
# - the vision tower's blocks follow the decoder's rule. Its patch embedding and merger are small and used once.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed|head)$", ("tensor", "fsdp")),
    (r"(q|k|v|qkv|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"(out|proj|down)/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
    (r"(q|k|v|gate|up)/lora_a$", ("fsdp", None)),
    (r"(q|k|v|gate|up)/lora_b$", (None, "tensor")),
    (r"(out|down)/lora_a$", ("tensor", None)),
    (r"(out|down)/lora_b$", (None, "fsdp")),
    (r".*", ()),
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 for what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, -int(np.prod(sizes)))
    if any(s < 1 for s in sizes) or np.prod(sizes) != len(devices):
        raise ValueError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter at `path` ("layers/attention/q/kernel") is split; a dimension that does not divide stays whole."""
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a nested dict of arrays or `ShapeDtypeStruct`s."""
    flat = flatten(params)
    return unflatten({path: NamedSharding(mesh, spec_of(path, x.shape, mesh)) for path, x in flat.items()})


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits dimension `axis` of a batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp")))


def batch_parts(mesh: Mesh) -> int:
    """Parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/attention/q/kernel": array} from nested dicts."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
