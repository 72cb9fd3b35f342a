"""SafeKey's safety heads (arXiv 2505.16186): linear maps from a mean of hidden states to the logit that a request is safe.

They train with a policy and are no part of it: nothing samples with them, and no export has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PREFIX = "heads/"
NAMES = ("full", "understanding")


def init_heads(width: int) -> dict[str, np.ndarray]:
    """Fresh heads by path, float32, for hidden states of `width` numbers.

    They are zero: all logits are 0, and the first gradient of their loss moves the heads alone.
    """
    shapes = {"kernel": (width, 1), "bias": (1,)}
    return {f"{PREFIX}{name}/{part}": np.zeros(shape, np.float32) for name in NAMES for part, shape in shapes.items()}


def without_heads(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's own parameters among those by path."""
    return {path: x for path, x in flat.items() if not path.startswith(PREFIX)}


def safety_logits(heads: Mapping[str, Any], means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits float[B] of the head on query and understanding, and of that on the understanding alone.

    Args:
      heads: by path, as `init_heads` names them; others are ignored.
      means: float[B, 2, D], mean hidden states of both spans, see `scoring.TreeScores`.
    """

    def logit(i: int, name: str) -> jax.Array:
        kernel, bias = (heads[f"{PREFIX}{name}/{part}"] for part in ("kernel", "bias"))
        return jnp.sum(means[:, i] * kernel[:, 0], axis=-1) + bias[0]

    full, understanding = (logit(i, name) for i, name in enumerate(NAMES))
    return full, understanding
