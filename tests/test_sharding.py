"""The table from parameter paths to mesh axes."""

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
