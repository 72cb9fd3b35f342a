"""Features of images under a frozen vision tower, made once and kept: programs that read them have no tower at all."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax import sharding
from srpo_jax.inputs import MERGE, Encoded, Features, VisionInputs, pad_to
from srpo_jax.models.policy import Policy, bucket
from srpo_jax.models.quantize import compute_params


class FeatureCache:
    """Gives examples the features of their images, and keeps the latest in the host's memory.

    Each example's images are encoded by themselves, so that their features depend on them and the tower alone, whatever was
    encoded or forgotten before. May be called by several threads.

    Attributes:
      nothing: no features, of their width and dtype (see `inputs.pack_vision`).
      encoded: examples that have been run through the tower.
    """

    def __init__(self, policy: Policy, params: Any, dtype: Any, room: int):
        """Makes an empty cache; all processes of a job together.

        Args:
          policy: whose module and sizes to use.
          params: nested parameters; the tower's are kept, and must not change.
          dtype: that the tower computes in, and of the features.
          room: bytes of features that are kept at most; the longest unused are forgotten first. 0 keeps none.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self.tower, _ = nnx.split(nnx.merge(policy.graphdef, shapes).vision)
        self.params = compute_params(params["vision"], dtype)
        if jax.process_count() > 1:  # each encodes images of its own, by itself
            here = jax.local_devices()[0]
            self.params = jax.tree.map(lambda x: jax.device_put(sharding.to_host(x), here), self.params)
        self.window, self.dtype, self.room = policy.config.vision.window_patches, jnp.dtype(dtype), room
        self.nothing = Features(np.zeros((0, policy.config.text.hidden_size), self.dtype))
        self.encoded = 0
        self._kept: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, example: Encoded) -> Encoded:
        """The example with `features`; itself without images."""
        if example.vision is None:
            return example
        name = _digest(example.vision)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            else:
                self._kept[name] = self._encode(example.vision)
            features = self._kept[name]
            while sum(x.nbytes for x in self._kept.values()) > self.room:
                self._kept.popitem(last=False)
        return dataclasses.replace(example, features=features)

    def _encode(self, vision: VisionInputs) -> np.ndarray:
        """float[patches / MERGE, D]."""
        self.encoded += 1
        count = len(vision.patches)
        padded = VisionInputs(*(pad_to(field, bucket(count, self.window), 0)[None] for field in vision))
        return np.asarray(_features(self.tower, self.params, padded, self.dtype))[: count // MERGE]


@functools.partial(jax.jit, static_argnames=("tower", "dtype"))
def _features(tower: nnx.GraphDef, params: Any, vision: VisionInputs, dtype: Any) -> jax.Array:
    return nnx.merge(tower, params)(vision._replace(patches=vision.patches.astype(dtype)))[0]


def _digest(vision: VisionInputs) -> bytes:
    digest = hashlib.sha256()
    for field in vision:
        digest.update(np.ascontiguousarray(field).tobytes())
    return digest.digest()
