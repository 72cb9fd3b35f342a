"""Settings of XLA: what the user has set stays, and this version of XLA knows every flag."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from srpo_jax import runtime


def test_nothing_is_set_without_a_gpu():
    assert runtime.environment({"XLA_FLAGS": "--xla_dump_to=x"}, gpu=False, deterministic=True) == {}


def test_what_the_user_has_set_stays():
    flags = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=x"
    given = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    assert runtime.environment(given, gpu=True) == {"XLA_FLAGS": flags}


def test_deterministic_mode_is_set_or_refused_but_never_dropped():
    assert "--xla_gpu_deterministic_ops=true" in runtime.environment({}, gpu=True, deterministic=True)["XLA_FLAGS"]
    assert "deterministic" not in runtime.environment({}, gpu=True)["XLA_FLAGS"]
    with pytest.raises(ValueError, match="--xla_gpu_deterministic_ops=false"):
        runtime.environment({"XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}, gpu=True, deterministic=True)


def start(flags: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, text=True)


def test_xla_knows_every_flag():
    """It ends a process with a flag that it does not know (the control)."""
    assert start(runtime.environment({}, gpu=True, deterministic=True)["XLA_FLAGS"]).returncode == 0
    assert "Unknown flag" in start("--xla_gpu_no_such_flag=true").stderr


def test_compiled_programs_are_kept(tmp_path):
    """Where the flag says, for the next process."""
    program = (
        "import jax; from srpo_jax import runtime; runtime.configure(cache='programs')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True)
    assert list((tmp_path / "programs").iterdir())
