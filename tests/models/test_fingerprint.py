"""Fingerprints: the same for the same content, another for anything else."""

import numpy as np

from srpo_jax.models.fingerprint import params_fingerprint


def test_fingerprint_sees_a_bit_and_a_swap():
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    mine = params_fingerprint(params)
    assert mine == params_fingerprint({"b": params["b"], "a": params["a"].copy()})
    bit, swap = params["a"].copy(), params["a"].copy()
    bit[1, 2] = np.nextafter(bit[1, 2], 9)
    swap[[0, 1]] = swap[[1, 0]]
    others = [{**params, "a": bit}, {**params, "a": swap}, {**params, "a": params["a"].astype(np.float16)}]
    others += [{"a": params["a"], "c": params["b"]}, {**params, "a": params["a"].reshape(3, 2)}]
    assert len({mine, *map(params_fingerprint, others)}) == 6
