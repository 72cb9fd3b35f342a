"""Short digests that tell whether something stored came from these parameters and this input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.inputs import Encoded
from srpo_jax.sharding import flatten


def input_fingerprint(encoded: Encoded) -> str:
    """Sixteen hexadecimal digits of an input's tokens, positions and pixels."""
    digest = hashlib.sha256(encoded.tokens.tobytes())
    digest.update(encoded.positions.tobytes())
    if encoded.vision is not None:
        for array in encoded.vision:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def params_fingerprint(params: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that tell parameters apart: names, shapes, dtypes and two checksums of all bits.

    The checksums are sums of integers, so they do not depend on how the arrays are sharded, and run where the arrays are.
    """
    flat = flatten(params)
    sums = jax.device_get(_checksums(flat))
    parts = [f"{path} {flat[path].dtype}{list(flat[path].shape)} {sums[path].tolist()}" for path in sorted(flat)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@jax.jit
def _checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def checksum(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")).astype(jnp.uint32)
        # Odd weights that differ by place, modulo 2^32: a changed or moved value changes the sum.
        place = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
        weights = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
        return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * weights, dtype=jnp.uint32)])

    return {path: checksum(jnp.asarray(x)) for path, x in flat.items()}
