"""The mesh, and the one table from parameter paths to mesh axes. Nobody else knows axis names.

Three axes: `data` replicates parameters, `fsdp` shards them and the batch, `tensor` splits heads, hidden units and the
vocabulary. Batches are split over `data` and `fsdp` together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How the parameter at `path` ("layers/attention/q/kernel") is split; a dimension that does not divide stays whole."""
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a nested dict of arrays or `ShapeDtypeStruct`s."""
    flat = flatten(params)
    return unflatten({path: NamedSharding(mesh, spec_of(path, x.shape, mesh)) for path, x in flat.items()})


def gathered_shardings(params: Any, mesh: Mesh) -> Any:
    """`param_shardings` without `fsdp`: every device holds parameters whole, or its share of them over `tensor`."""
    flat = flatten(params)
    return unflatten({path: NamedSharding(mesh, _gathered(path, x.shape, mesh)) for path, x in flat.items()})


def _gathered(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    return PartitionSpec(*(a if a == "tensor" else None for a in spec_of(path, shape, mesh)))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits dimension `axis` of a batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp")))


def split_batch(x: jax.Array) -> jax.Array:
    """An activation with axis 0 split like a batch, where a mesh is in scope (`jax.set_mesh`) whose parts divide it.

    Left alone, the partitioner may follow the kernels, which `fsdp` splits, too: it then keeps every example on every device
    and splits the width, at the price of a reduction per product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_parts(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))


def with_gathered(f: Callable[..., jax.Array], path: str, table: jax.Array) -> Callable[..., jax.Array]:
    """`f(table, *batch)` as a function of the batch, run by every device of the mesh in scope on its own part of it.

    For a loop that reads a parameter in every round. Left alone, the partitioner gathers the parameter in every round, and in
    every round reduces its gradient; here it is gathered before the first and reduced after the last, in float32 or wider as
    far as the compiler follows (one for TPUs was seen to reduce in bfloat16).

    Args:
      f: of the parameter and of arrays whose first axis is the batch's; so is its result.
      path: of the parameter, for the table.
      table: the parameter, split by the table over `fsdp`; what `tensor` splits stays split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else batch_parts(mesh)

    def run(*batch: jax.Array) -> jax.Array:
        if parts == 1 or batch[0].shape[0] % parts:
            return f(table, *batch)
        each = PartitionSpec(("data", "fsdp"))
        local = jax.shard_map(
            lambda whole, *batch: f(whole.astype(table.dtype), *batch),
            mesh=mesh,
            in_specs=(PartitionSpec(), *(each for _ in batch)),
            out_specs=each,
            axis_names={"data", "fsdp"},
            check_vma=False,
        )
        whole = jax.lax.with_sharding_constraint(table, _gathered(path, table.shape, mesh))
        return local(whole.astype(jnp.promote_types(table.dtype, jnp.float32)), *batch)

    return run


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_parts(mesh: Mesh) -> tuple[int, ...]:
    """Which of the parts of a batch this process's devices hold, ascending: what it has to read."""
    count = batch_parts(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((count,))
    return tuple(sorted({part for index in places.values() if index for part in range(count)[index[0]]}))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from what this process has read of a batch of micro-batches: `local_parts`, along the second axis."""
    place, mine, count = batch_sharding(mesh, axis=1), local_parts(mesh), batch_parts(mesh)

    def put(x: np.ndarray) -> jax.Array:
        each = x.shape[1] // len(mine)

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(each * count)
            first = mine.index(start // each) * each
            return x[:, first : first + stop - start]

        return jax.make_array_from_callback((x.shape[0], each * count, *x.shape[2:]), place, read)

    return jax.tree.map(put, batch)


def place(tree: Any, where: NamedSharding) -> Any:
    """Global arrays from numpy arrays that every process has whole; each gives its devices their part."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), tree)


def to_host(x: Any) -> np.ndarray:
    """An array whole, as numpy on every host; called by all processes together.

    What lies on devices of several processes passes through every device: no more than a tensor of a checkpoint at a time.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if not x.is_fully_replicated:
        mesh = mesh_of(x)
        assert mesh is not None, x.sharding  # our programs run with a mesh in scope
        x = jax.device_put(x, replicated(mesh))
    return np.asarray(x.addressable_data(0))


def cache_sharding(mesh: Mesh, shape: tuple[int, ...], heads: int) -> NamedSharding:
    """For keys and values [layers, trees, ...]: trees split like a batch, axis `heads` over tensor where that divides it."""
    split = "tensor" if shape[heads] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), *(None,) * (heads - 2), split))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None where they lie on one device without any."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == AXES else None


def from_local(tree: Any, where: NamedSharding) -> Any:
    """Arrays on the mesh from this process's part of them, numpy."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), tree)


def to_local(x: jax.Array) -> np.ndarray:
    """This process's part along axis 0 of an array that is split there, numpy."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def per_batch_part(f: Callable[..., Any], heads: int | None = None) -> Callable[..., Any]:
    """`f`, run by every device of the mesh in scope (`jax.set_mesh`) on its own part of the batch; `f` itself without one.

    For kernels, which the compiler cannot split.

    Args:
      f: of pytrees of arrays whose first axis is the batch's; so is its result.
      heads: key/value heads. If given, all arguments but the first have heads on their last axis but one, and so has the
        result; they are split over `tensor` if it divides them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f
    batch = PartitionSpec(("data", "fsdp"))
    if heads is None:
        return jax.shard_map(f, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
    tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(("data", "fsdp"), None, None, tensor)
    return jax.shard_map(f, mesh=mesh, in_specs=(batch, split, split, split), out_specs=split, check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/attention/q/kernel": array} from nested dicts."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
