"""TPU slices by the names under which they are rented, as devices to compile for; needs `libtpu`, but no TPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from srpo_jax import sharding
from srpo_jax.flops import CHIPS, Chip

# Chips of a slice. A v5p is named after its cores, two per chip.
_LAYOUTS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TOPOLOGIES = {f"{kind}-{n}": f"{kind}:{layout}" for kind in ("v5e", "v6e") for n, layout in _LAYOUTS.items()}
TOPOLOGIES |= {"v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-32": "v5p:2x2x4", "v5p-64": "v5p:2x4x4"}
TOPOLOGIES |= {"v5p-128": "v5p:4x4x4"}
# What the compiler lets a program use of a chip's memory, in bytes: the rest is the runtime's.
USABLE = {"v5e": int(15.75 * 2**30), "v5p": int(95.74 * 2**30), "v6e": int(31.25 * 2**30)}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice to compile for.

    Attributes:
      name: "v5e-16", or the topology where it has no such name.
      topology: "v5e:4x4".
      devices: to make a mesh of; they run nothing.
      usable: bytes of memory per device that a program may take.
    """

    name: str
    topology: str
    devices: Sequence[jax.Device]
    usable: int

    @property
    def chip(self) -> Chip:
        """Peak numbers of a chip."""
        return CHIPS[self.topology.partition(":")[0]]

    def mesh(self, **axes: int) -> jax.sharding.Mesh:
        """A mesh over the slice's devices; sizes as for `sharding.make_mesh`."""
        return sharding.make_mesh(**axes, devices=list(self.devices))


def find_slice(name: str) -> Slice:
    """The slice of a name ("v5e-16") or topology ("v5e:4x4").

    Raises:
      ValueError: an unknown name, a kind of chip without known limits, or a layout that the compiler refuses.
      RuntimeError: no TPU compiler is installed.
    """
    topology = TOPOLOGIES.get(name, name)
    kind, _, layout = topology.partition(":")
    if kind not in USABLE or not layout:
        raise ValueError(
            f"topology {name!r}: give a slice of {', '.join(TOPOLOGIES)}, or a layout such as 'v5e:4x4' of {', '.join(USABLE)}"
        )
    # Asked for at home, without a metadata server to tell of a TPU, and beside other processes that compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    one = {"chips_per_host_bounds": (1, 1, 1)} if layout in ("1x1", "1x1x1") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one)
    except Exception as error:
        if "libtpu" in str(error).lower() or isinstance(error, NotImplementedError):
            raise RuntimeError(f"no TPU compiler ({error}); pip install 'srpo_jax[tpu]' installs libtpu") from error
        raise ValueError(f"topology {topology!r}: {error}") from error
    names = {layout: name for name, layout in TOPOLOGIES.items()}
    return Slice(names.get(topology, topology), topology, tuple(found.devices), USABLE[kind])
