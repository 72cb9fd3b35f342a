"""The table from parameter paths to mesh axes."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from srpo_jax import sharding


def abstract_mesh(data=1, fsdp=2, tensor=2):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed", (512, 128), ("tensor", "fsdp")),
        ("layers/attention/q/kernel", (4, 128, 128), (None, "fsdp", "tensor")),
        ("layers/attention/out/kernel", (4, 128, 128), (None, "tensor", "fsdp")),
        ("layers/mlp/down/kernel", (4, 384, 128), (None, "tensor", "fsdp")),
        ("layers/attention/q/bias", (4, 128), (None, None)),
        ("layers/mlp_norm/scale", (4, 128), (None, None)),
        ("vision/layers/attention/qkv/kernel", (3, 128, 384), (None, "fsdp", "tensor")),
    ],
)
def test_kernels_into_heads_split_outputs_and_kernels_out_of_them_inputs(path, shape, spec):
    assert sharding.spec_of(path, shape, abstract_mesh()) == PartitionSpec(*spec)


def test_a_dimension_that_does_not_divide_stays_whole():
    assert sharding.spec_of("embed", (511, 128), abstract_mesh()) == PartitionSpec(None, "fsdp")


def test_flatten_round_trip():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert sharding.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert sharding.unflatten(sharding.flatten(tree)) == tree


def test_a_mesh_that_does_not_cover_the_devices_is_refused():
    with pytest.raises(ValueError, match="does not cover"):
        sharding.make_mesh(data=3, fsdp=5, tensor=7)


IMAGES_STAY_WHOLE = """
import jax, jax.numpy as jnp
from flax import nnx
from srpo_jax import sharding
from srpo_jax.inputs import VisionInputs
from srpo_jax.models.config import VisionConfig
from srpo_jax.models.vision import VisionTower

mesh = sharding.make_mesh(fsdp=8)
tower = VisionTower(VisionConfig(2, 16, 16, 2, 3, 14, 2, 2, 56, (1,), 16), nnx.Rngs(0))
graphdef, state = nnx.split(tower)
params = nnx.to_pure_dict(state)
params = jax.device_put(params, sharding.param_shardings(params, mesh))
shapes = ((8, 32, 1176), jnp.float32), ((8, 32, 2), jnp.int32), ((8, 32), jnp.int32)
images = VisionInputs(*(jax.ShapeDtypeStruct(*s, sharding=sharding.batch_sharding(mesh)) for s in shapes))
# A new function each time: a compiled one would be found again.
run = lambda: jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(x)).lower(params, images).compile().as_text()
print("all-reduce" in run())
with jax.set_mesh(mesh):
    print("all-reduce" in run())
"""


def test_the_vision_tower_computes_whole_images_on_each_device():
    """Kernels are gathered, products are not summed over devices; without a mesh in scope they are (the control)."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", IMAGES_STAY_WHOLE], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
