"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) in Flax NNX.

The decoder is written once and run in three ways, which differ only in what a token attends to: over whole sequences
(`trunk`), over a comb of trunk and branches (`comb`), and one token at a time over a comb (`decode`). A layer receives the
attention as a function of its queries, keys and values. Layers are stacked on a leading axis and scanned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax.inputs import Features, Inputs, PackedInputs, PackedVision, VisionInputs
from srpo_jax.models import attention
from srpo_jax.models.attention import KeyValues
from srpo_jax.models.config import ModelConfig, TextConfig
from srpo_jax.models.decoding import CombCache, attend_decode
from srpo_jax.models.layers import INIT_STD, GatedMLP, Linear, Remat, RMSNorm, rematerialised, rotate, stacked
from srpo_jax.models.logprobs import head_logits
from srpo_jax.models.vision import VisionTower
from srpo_jax.sharding import split_batch
from srpo_jax.trees import Rows

# (queries, keys, values) -> (attention output, anything the caller wants to keep of this layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def mrope_angles(positions: jax.Array, config: TextConfig) -> jax.Array:
    """Rotary angles of tokens with three position ids.

    Each frequency reads one of the ids: the first `mrope_section[0]` frequencies the time, the next the height, then the
    width. With equal ids this is ordinary rotary embedding.

    Args:
      positions: int32[B, 3, ...].
      config: the decoder's configuration.

    Returns:
      float32[B, ..., head_dim / 2].
    """
    section = np.repeat(np.arange(3), config.mrope_section)
    return jnp.moveaxis(positions[:, section], 1, -1) * _frequencies(config)


def text_angles(positions: jax.Array, config: TextConfig) -> jax.Array:
    """Rotary angles float32[..., head_dim / 2] of text tokens, whose three ids are equal: positions int32[...]."""
    return positions[..., None] * _frequencies(config)


def _frequencies(config: TextConfig) -> jax.Array:
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return jnp.asarray((1.0 / config.rope_theta**half).astype(np.float32))


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary embedding; biases on queries, keys and values only."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, queries, bias=True, rngs=rngs)
        self.k = Linear(config.hidden_size, keys, bias=True, rngs=rngs)
        self.v = Linear(config.hidden_size, keys, bias=True, rngs=rngs)
        self.out = Linear(queries, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        q, k, v = (f(x).reshape(*x.shape[:-1], -1, self.head_dim) for f in (self.q, self.k, self.v))
        y, kept = attend(rotate(q, angles), rotate(k, angles), v)
        return self.out(y.reshape(*x.shape[:-1], -1)), kept


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU block."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        norm: dict[str, Any] = {"eps": config.rms_norm_eps, "rngs": rngs}
        self.attention_norm = RMSNorm(config.hidden_size, **norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        y, kept = self.attention(self.attention_norm(x), angles, attend)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kept


class Qwen2_5_VL(nnx.Module):
    """The whole model. Parameters: `vision`, `embed` [V, D], stacked `layers`, `norm`, and `head` [V, D] unless tied."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        text = config.text
        self.config = config
        self.vision = VisionTower(config.vision, rngs)
        table = (text.vocab_size, text.hidden_size)
        self.embed = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), table))
        self.layers = stacked(lambda r: DecoderLayer(text, r), text.num_layers, rngs)
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps, rngs=rngs)
        self.head = None if text.tie_word_embeddings else nnx.Param(INIT_STD * jax.random.normal(rngs.params(), table))

    def __call__(self, inputs: Inputs, *, remat: Remat = "none") -> jax.Array:
        """Logits float32[B, T, V] of the next token."""
        hidden, _ = self.trunk(inputs, self.encode_images(inputs.vision, remat=remat), remat=remat)
        return head_logits(hidden, self.output_embedding)

    @property
    def output_embedding(self) -> jax.Array:
        """float[V, D]; the input embedding where the two are tied."""
        return (self.embed if self.head is None else self.head)[...]

    def encode_images(
        self, vision: VisionInputs | PackedVision | Features | None, *, remat: Remat = "none"
    ) -> jax.Array | None:
        """Merged image features float[B, N / MERGE, D] of each row or buffer, or None without images."""
        if vision is None:
            return None
        dtype = self.embed[...].dtype
        if isinstance(vision, Features):
            return jnp.asarray(vision.values, dtype)
        patches = VisionInputs(jnp.asarray(vision.patches, dtype), vision.positions, vision.images)
        rows = (vision.rows, vision.places) if isinstance(vision, PackedVision) else None
        return self.vision(patches, remat=remat, rows=rows)

    def embed_tokens(self, tokens: jax.Array, image_slots: jax.Array, features: jax.Array | None) -> jax.Array:
        """float[B, T, D]: token embeddings, image tokens replaced by the feature of their slot."""
        x = self.embed[...][tokens]
        if features is None:
            return x
        picked = jnp.take_along_axis(features, jnp.maximum(image_slots, 0)[..., None], axis=1)
        return jnp.where((image_slots >= 0)[..., None], picked.astype(x.dtype), x)

    def trunk(
        self, inputs: Inputs, features: jax.Array | None, *, keep_kv: bool = False, remat: Remat = "none"
    ) -> tuple[jax.Array, KeyValues | None]:
        """Ordinary causal forward.

        Returns:
          The final normed hidden states float[B, T, D] and, if `keep_kv`, every layer's keys and values
          float[layers, B, T, K, head_dim].
        """
        mask = attention.causal_mask(inputs.lengths, inputs.tokens.shape[1])
        angles = mrope_angles(inputs.positions, self.config.text)

        def attend(q, k, v):
            return attention.attend(q, k, v, mask), (k, v) if keep_kv else None

        def step(layer, x):
            return layer(x, angles, attend)

        x = self.embed_tokens(inputs.tokens, inputs.image_slots, features)
        x, kv = self._scan(step, x, remat=remat)
        return self.norm(x), kv

    def comb(
        self, rows: Rows, features: jax.Array | None, *, remat: Remat = "none", backend: str = "auto"
    ) -> jax.Array:
        """Trees, each token once, in one pass through the layers.

        Args:
          rows: the packed trees.
          features: merged image features float[G, m, D] of each buffer's trees.
          remat: what each layer keeps for the backward pass (see `layers.rematerialised`).
          backend: of the attention, see `attention.tree_attention`.

        Returns:
          Final normed hidden states float[G, N, R, D].
        """
        buffers = rows.tokens.shape[0]
        tokens, slots = (x.reshape(buffers, -1) for x in (rows.tokens, rows.image_slots))
        angles = mrope_angles(jnp.asarray(rows.positions), self.config.text)
        attend = attention.tree_attention(rows, backend)

        def step(layer, x):
            return layer(split_batch(x), angles, lambda q, k, v: (attend(q, k, v), None))

        x = self.embed_tokens(tokens, slots, features)
        x, _ = self._scan(step, x.reshape(*rows.tokens.shape, -1), remat=remat)
        return self.norm(split_batch(x))

    def prefill(self, packed: PackedInputs) -> tuple[jax.Array, KeyValues]:
        """The trunks of `packed`, each causal in itself: images encoded and tokens run once, end to end.

        Returns:
          Final normed hidden states float[F, D] of the buffer, and every layer's keys and values
          float[layers, n, T, K, head_dim] of its sequences (meaningless beyond their lengths).
        """
        features = self.encode_images(packed.vision)
        mask = attention.causal_mask(packed.lengths, packed.rows.shape[1])
        angles = mrope_angles(packed.positions[None], self.config.text)

        def attend(q, k, v):
            q, k, v = (x[0][packed.rows] for x in (q, k, v))
            y = attention.attend(q, k, v, mask)
            return y.reshape(-1, *y.shape[2:])[packed.places][None], (k, v)

        def step(layer, x):
            return layer(x, angles, attend)

        x = self.embed_tokens(packed.tokens[None], packed.image_slots[None], features)
        x, kv = self._scan(step, x, remat="none")
        return self.norm(x)[0], kv

    def decode(
        self, tokens: jax.Array, positions: jax.Array, limits: jax.Array, cache: CombCache, steps: jax.Array
    ) -> tuple[jax.Array, CombCache]:
        """One more token of every branch, each at its own step.

        Args:
          tokens: int32[B, M], the branches' newest tokens.
          positions: int32[B, M], their position ids.
          limits: int32[B, M], trunk tokens that each branch sees.
          cache: with a leading layer axis, own keys and values filled below `steps`.
          steps: int32[B, M], tokens of each branch that are already in the cache.

        Returns:
          Final normed hidden states float[B, M, D] and the grown cache.
        """
        angles = text_angles(positions, self.config.text)
        layer_def, layers = nnx.split(self.layers)

        def one_layer(carry, xs):
            x, own, index = carry
            state, trunk = xs

            def attend(q, k, v):
                grown = own.write(k, v, steps, index)
                return attend_decode(q, trunk, grown.layer(index), limits, steps), grown

            x, grown = nnx.merge(layer_def, state)(x, angles, attend)
            return (x, grown, index + 1), None

        carry = (self.embed[...][tokens], cache.own, jnp.int32(0))
        (x, own, _), _ = jax.lax.scan(one_layer, carry, (layers, cache.trunk))
        return self.norm(x), cache._replace(own=own)

    def _scan(self, step: Callable[[Any, Any], tuple[Any, Any]], x: Any, *, remat: Remat) -> tuple[Any, Any]:
        """Runs `step(layer, x) -> (x, kept)` over the stacked layers."""
        layer_def, layers = nnx.split(self.layers)

        def body(x, layer_state):
            return step(nnx.merge(layer_def, layer_state), x)

        return jax.lax.scan(rematerialised(body, remat), x, layers)
