"""Set-up that every test relies on; runs before JAX is imported."""

from __future__ import annotations

import os
from pathlib import Path

# The suite runs on the CPU also where an accelerator or libtpu is installed, and never asks a hub for anything.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiled programs are shared between the test processes and from run to run.
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from hypothesis import settings  # noqa: E402  (after the environment is set)

# A first call may compile or wait for a busy disk; the deadline of hypothesis would take that for a failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
