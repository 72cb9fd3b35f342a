"""Promises of weights behind an address: every slice is that of the file, nothing broken is read, nothing half is a model."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from srpo_jax.models.remote import is_address, open_tensors

DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    values = np.arange(7 * 5 * 3, dtype=np.float32)
    save_file({"b": values.reshape(7, 15), "a": values.reshape(7, 5, 3), "half": values.astype(jnp.bfloat16)}, path)
    return epath.Path(path)


@given(st.data())
def test_any_slice_is_that_of_the_safetensors_library(file, data):
    ours = open_tensors(file, DTYPES)
    with safe_open(file, framework="numpy") as theirs:
        assert ours.keys() == set(theirs.keys())
        for name, tensor in ours.items():
            reference = theirs.get_slice(name)
            assert (tensor.get_shape(), tensor.get_dtype()) == (reference.get_shape(), reference.get_dtype())
            index = []
            for size in tensor.get_shape():
                start = data.draw(st.integers(0, size - 1))
                index.append(slice(start, data.draw(st.integers(start + 1, size))))
            found = tensor[tuple(index)]
            assert found.dtype == reference[tuple(index)].dtype
            np.testing.assert_array_equal(found, reference[tuple(index)])


def test_a_broken_file_is_named(file, tmp_path):
    whole = file.read_bytes()
    for number, content in enumerate(
        (b"", b"version https://git-lfs", b"\xff" * 8 + whole, whole[:40], b"\2" + bytes(7) + b"[]")
    ):
        broken = epath.Path(tmp_path / f"{number}.safetensors")
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.safetensors: not a readable safetensors file"):
            open_tensors(broken, DTYPES)
    short = epath.Path(tmp_path / "short.safetensors")
    short.write_bytes(whole[:-10])
    last = max(open_tensors(short, DTYPES).values(), key=lambda tensor: tensor._start)
    with pytest.raises(ValueError, match="shorter than its header says"):
        last[:]


def test_what_an_address_is():
    assert is_address("gs://bucket/model") and is_address(epath.Path("gs://bucket/model"))
    assert not is_address("/models/gs:/x") and not is_address("model")
    assert json.dumps(str(epath.Path("gs://bucket") / "a")) == '"gs://bucket/a"'
