"""The fused kernel for TPUs: in an emulator it gives the reference's values and gradients; compiled, it keeps no scores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.inputs import Encoded
from srpo_jax.models import attention, splash
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Rows, Trunk, pack_trees

pytestmark = pytest.mark.slow


def tree(rng, length, ends, branches):
    positions = np.zeros((3, length), np.int32)
    encoded = Encoded(rng.integers(5, 99, length).astype(np.int32), positions, np.full(length, -1, np.int32))
    made = [
        Branch(i % (len(ends) - 1), rng.integers(5, 99, n).astype(np.int32), np.zeros(n, np.float32), "ok", True)
        for i, n in enumerate(branches)
    ]
    return ReasoningTree(Trunk("r", encoded, ends), tuple(made))


def test_the_kernel_has_the_values_and_gradients_of_the_reference(monkeypatch):
    """Two buffers of two trees, grouped queries, several blocks of the mask, some of them empty; paths that stand there again
    without their prompts."""
    pytest.importorskip("tokamax")
    from jax.experimental.pallas import tpu

    monkeypatch.setattr(splash, "BLOCK", 128)
    rng = np.random.default_rng(0)
    pair = [tree(rng, 150, (60, 90, 120), [40, 60, 30, 20, 64]), tree(rng, 70, (30, 50, 60), [60, 20, 33])]
    pack = PackConfig((150,), (100,), (8,), 64, (5,), (65,), extras=("key_lengths", "key_slots"), key_step=2)
    rows = pack_trees([*pair, *pair[::-1]], pack, buffers=2)[0].rows
    q, k, v, weights = (jnp.asarray(rng.normal(size=(2, 16, 64, h, 128)), jnp.float32) for h in (4, 2, 2, 4))

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda a: (lambda y: (jnp.sum(y * weights), y))(attend(*a)), has_aux=True))

    (_, ours), gradients = run(splash.tree_attention(rows, interpret=tpu.InterpretParams()))((q, k, v))
    (_, wanted), expected = run(attention.tree_attention(rows, "xla"))((q, k, v))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)  # sums of a thousand terms of order one


def test_rows_that_the_kernel_cannot_take_are_refused():
    odd = np.zeros((1, 3, 50), np.int32)
    rows = Rows(odd, odd, odd, odd, odd, odd)
    assert not splash.suits(rows)
    with pytest.raises(ValueError, match=r"multiple of 128 tokens, not \(3, 50\): make pack.row"):
        attention.tree_attention(rows, "splash")


COMPILE = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from srpo_jax import sharding
from srpo_jax.models import attention, logprobs
from srpo_jax.trees import Rows

sizes = [int(n) for n in sys.argv[2].split("x")]
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = sharding.make_mesh(*sizes, devices=devices[: sizes[0] * sizes[1] * sizes[2]])
parts = sharding.batch_parts(mesh)

def array(*shape, dtype=jnp.int32):
    where = sharding.batch_sharding(mesh) if shape[0] == parts else sharding.replicated(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

def tree_attention(backend):
    n, r = 30, 256
    rows = Rows(*[array(parts, n, r), array(parts, 3, n, r), *[array(parts, n, r)] * 3, array(parts, n, 6)])
    qkv = tuple(array(parts, n, r, heads, 128, dtype=jnp.bfloat16) for heads in (16, 2, 2))
    def loss(qkv, rows):
        return jnp.sum(attention.tree_attention(rows, backend)(*qkv).astype(jnp.float32) ** 2)
    return jax.grad(loss), (qkv, rows)

def head(_):
    def loss(hidden, head, targets):
        return jnp.sum(logprobs.token_logprobs(hidden, head, targets, 256))
    hidden, matrix = (array(*shape, dtype=jnp.bfloat16) for shape in ((1, 6144, 2048), (151_936, 2048)))
    return jax.grad(loss), (hidden, matrix, array(1, 6144))

f, args = {"head": head}.get(sys.argv[1], tree_attention)(sys.argv[1])
with jax.set_mesh(mesh):
    compiled = jax.jit(f).lower(*args).compile()
kernels = compiled.as_text().count("tpu_custom_call")
print(kernels, compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize(
    ("what", "mesh", "megabytes"),
    [("splash", "1x1x1", 250), ("splash", "2x2x2", 250), ("xla", "1x1x1", 250), ("head", "1x1x1", 160)],
)
def test_temporaries_on_a_tpu_stay_small(what, mesh, megabytes):
    """Compiled ahead of time for v5e, per device: 7,680 tokens with 16 query and 2 key/value heads; 6,144 logits of 151,936.

    On the mesh each device runs the kernel on its own buffer, with half of the heads.
    """
    pytest.importorskip("libtpu")
    if what == "splash":
        pytest.importorskip("tokamax")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", COMPILE, what, mesh]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, temporaries = map(int, done.stdout.split()[-2:])
    assert (kernels > 0) == (what == "splash")
    assert temporaries <= megabytes * 1e6, temporaries
