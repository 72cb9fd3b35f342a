"""Settings of XLA and its libraries that matter, in one place, each with its reason. What the user has set already stays.

They are environment variables and must stand before JAX touches a device; scripts apply them first of all.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax

GPU_FLAGS = {
    # Collectives of sharded parameters run while products do; by default XLA for GPUs waits for each.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}
DETERMINISTIC_FLAGS = {
    # Sums by atomic operations come in any order, and autotuning takes whichever kernel was faster that day: both change bits.
    "xla_gpu_deterministic_ops": "true",
}
GPU_SETTINGS = {
    # JAX reserves three quarters of a GPU; a training state wants the rest, too. Some is left to NCCL, cuDNN and CUDA graphs.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}
# cuDNN: attention has to be asked for, per call; that is a matter of `compute.attention`. NCCL: its own choices are left alone,
# because none of its settings was seen to matter here.


def environment(given: Mapping[str, str], *, gpu: bool, deterministic: bool = False) -> dict[str, str]:
    """What to add to an environment.

    Args:
      given: the environment so far; a variable or XLA flag that it has is left as it is.
      gpu: whether programs may run on NVIDIA GPUs; without, there is nothing to set.
      deterministic: the same bits in every run of a program on the same kind of GPU, at the price of slower kernels. TPUs and
        CPUs give them anyway.

    Raises:
      ValueError: `deterministic` against an XLA flag that is given.
    """
    if not gpu:
        return {}
    flags = given.get("XLA_FLAGS", "").split()
    names = {flag.lstrip("-").partition("=")[0]: flag for flag in flags}
    if deterministic:
        against = [names[n] for n, v in DETERMINISTIC_FLAGS.items() if n in names and not names[n].endswith(f"={v}")]
        if against:
            raise ValueError(f"--deterministic, but XLA_FLAGS has {' '.join(against)}; drop one of the two")
    wanted = GPU_FLAGS | (DETERMINISTIC_FLAGS if deterministic else {})
    flags += [f"--{name}={value}" for name, value in wanted.items() if name not in names]
    return {"XLA_FLAGS": " ".join(flags)} | {k: v for k, v in GPU_SETTINGS.items() if k not in given}


def has_gpu_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed and not excluded by `JAX_PLATFORMS`."""
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    installed = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    return installed and any(name in platforms for name in ("cuda", "gpu"))


def configure(*, deterministic: bool = False, cache: str | None = None) -> None:
    """Sets up this process; to be called before anything touches a device.

    Args:
      deterministic: see `environment`.
      cache: folder of compiled programs, which may be a bucket that all hosts share; programs of released sizes take minutes to
        compile, and a run that was preempted finds them there. None leaves it to JAX_COMPILATION_CACHE_DIR.
    """
    os.environ.update(environment(os.environ, gpu=has_gpu_plugin(), deterministic=deterministic))
    if cache:
        folder = cache if "://" in cache else str(Path(cache).expanduser().absolute())
        jax.config.update("jax_compilation_cache_dir", folder)
