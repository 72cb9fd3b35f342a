"""The vision tower of Qwen2.5-VL: patches in window order to features that stand in for token embeddings.

Shapes: `B` rows of the batch, `N` patches of a row (padding included, a whole number of windows), `H` heads, `D` head
size. Source: the Qwen2.5-VL report (arXiv 2502.13923), section 2.1.1. The layout of the patches is that of
`models.geometry`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.inputs import VisionInputs
from srpo_jax.models.attention import attend
from srpo_jax.models.config import VisionConfig
from srpo_jax.models.layers import GatedMLP, Linear, Remat, RMSNorm, rematerialised, rotate, stacked, wide
from srpo_jax.sharding import split_batch

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
QUERY_CHUNK = 1024  # patches; bounds the score matrix of full attention to [B, H, 1024, N]


class VisionAttention(nnx.Module):
    """Multi-head attention among the patches of one image, or of one window of it."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q = Linear(width, width, bias=True, rngs=rngs)
        self.k = Linear(width, width, bias=True, rngs=rngs)
        self.v = Linear(width, width, bias=True, rngs=rngs)
        self.out = Linear(width, width, bias=True, rngs=rngs)
        self.config = config

    def __call__(
        self, x: jax.Array, angles: jax.Array, images: jax.Array, full: jax.Array | bool, rows: PatchRows | None = None
    ) -> jax.Array:
        """Attends.

        Args:
          x: float[B, N, width].
          angles: float[B, N, D/2], rotary angles.
          images: int32[B, N], image of each patch; 0 for padding, which sees and is seen by padding only.
          full: bool[], attend within the whole image rather than the window. A Python bool compiles one kind only.
          rows: where examples stand end to end in each of the B buffers, the patches of each: full attention runs over these.
        """
        heads = (*x.shape[:2], self.config.num_heads, -1)
        q, k = (rotate(projection(x).reshape(heads), angles) for projection in (self.q, self.k))
        v = self.v(x).reshape(heads)
        windowed, whole = _windowed(self.config.window_patches), functools.partial(_attend_rows, rows)
        if isinstance(full, bool):
            y = (whole if full else windowed)(q, k, v, images)
        else:
            y = jax.lax.cond(full, whole, windowed, q, k, v, images)
        return self.out(y.reshape(x.shape))


PatchRows = tuple[jax.Array, jax.Array]
"""`PackedVision.rows` and `.places`."""


def _attend_rows(rows: PatchRows | None, q: jax.Array, k: jax.Array, v: jax.Array, images: jax.Array) -> jax.Array:
    """`_attend_images`, of packed examples one by one."""
    if rows is None:
        return _attend_images(q, k, v, images)

    def apart(x: jax.Array) -> jax.Array:
        picked = jax.vmap(lambda one, where: one.at[where].get(mode="fill", fill_value=0))(x, rows[0])
        return picked.reshape(-1, *picked.shape[2:])

    y = _attend_images(*map(apart, (q, k, v, images)))
    y = y.reshape(q.shape[0], -1, *y.shape[2:])
    return jax.vmap(lambda one, where: one[where])(y, rows[1])


def _windowed(size: int):
    """Attention within windows of `size` consecutive patches. No window holds patches of two images."""

    @jax.checkpoint
    def attend_windows(q: jax.Array, k: jax.Array, v: jax.Array, images: jax.Array) -> jax.Array:
        def split(x: jax.Array) -> jax.Array:
            return x.reshape(-1, size, *x.shape[2:])

        return attend(split(q), split(k), split(v), _same_image(split(images), split(images))).reshape(q.shape)

    return attend_windows


# Recomputed in the backward pass: a scan over layers would otherwise keep the score matrices of both kinds of attention
# for every layer, those of the branch not taken included.
@jax.checkpoint
def _attend_images(q: jax.Array, k: jax.Array, v: jax.Array, images: jax.Array) -> jax.Array:
    """Attention within whole images, in chunks of queries."""
    chunks = -(-q.shape[1] // QUERY_CHUNK)
    if chunks == 1:
        return attend(q, k, v, _same_image(images, images))

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * QUERY_CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(x.shape[0], chunks, QUERY_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return attend(part[0], k, v, _same_image(part[1], images))

    y = jax.lax.map(chunk, (split(q), split(images)))
    return y.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]


def _same_image(query: jax.Array, key: jax.Array) -> jax.Array:
    return query[:, :, None] == key[:, None, :]


class VisionBlock(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, eps=NORM_EPS, rngs=rngs)
        self.attention = VisionAttention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=NORM_EPS, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: jax.Array, images: jax.Array, full: jax.Array | bool, rows: PatchRows | None = None
    ) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), angles, images, full, rows)
        return x + self.mlp(self.mlp_norm(x))


class PatchMerger(nnx.Module):
    """Joins the patches of a merge unit into one feature of the decoder's width."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width = config.hidden_size * config.merge_unit
        self.norm = RMSNorm(config.hidden_size, eps=NORM_EPS, rngs=rngs)
        self.up = Linear(width, width, bias=True, rngs=rngs)
        self.down = Linear(width, config.out_hidden_size, bias=True, rngs=rngs)
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, N, hidden] to float[B, N / merge**2, out_hidden]."""
        units = self.norm(x).reshape(x.shape[0], -1, self.width)
        return self.down(jax.nn.gelu(self.up(units), approximate=False))


class VisionTower(nnx.Module):
    """Images to features. The layers' parameters are stacked on a leading axis and scanned."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=False, rngs=rngs)
        self.blocks = stacked(lambda r: VisionBlock(config, r), config.depth, rngs)
        self.merger = PatchMerger(config, rngs)
        self.config = config

    def __call__(self, inputs: VisionInputs, *, remat: Remat = "none", rows: PatchRows | None = None) -> jax.Array:
        """Features of the merge units.

        Args:
          inputs: patches of each row, N a multiple of the patches in a window. Their dtype is computed in.
          remat: what each layer keeps for the backward pass (see `layers.rematerialised`).
          rows: see `VisionAttention`.

        Returns:
          float[B, N / merge**2, out_hidden], in window order like the patches. Features of padding are meaningless.
        """
        return self.merger(self.encode(inputs, remat=remat, rows=rows))

    def encode(self, inputs: VisionInputs, *, remat: Remat = "none", rows: PatchRows | None = None) -> jax.Array:
        """float[B, N, hidden], the patches' states after the last layer. Arguments as in `__call__`."""
        size = inputs.patches.shape[1]
        if size % self.config.window_patches:
            raise ValueError(f"{size} patches are not a whole number of windows of {self.config.window_patches}")
        x = self.patch_embed(jnp.asarray(inputs.patches))
        angles = rotary_angles(jnp.asarray(inputs.positions), self.config, wide(x).dtype)
        images = jnp.asarray(inputs.images)
        graphdef, layers = nnx.split(self.blocks)

        kinds = [i in self.config.fullatt_block_indexes for i in range(self.config.depth)]
        mixed = len(set(kinds)) > 1

        def layer(x: jax.Array, scanned: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
            params, full = scanned
            # With one kind of attention throughout there is no conditional to compile.
            kind = full if mixed else kinds[0]
            return nnx.merge(graphdef, params)(split_batch(x), angles, images, kind, rows), None

        return jax.lax.scan(rematerialised(layer, remat), x, (layers, jnp.asarray(kinds)))[0]


def rotary_angles(positions: jax.Array, config: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """Angles of the 2-D rotary embedding: half of the frequencies turn with the row, the others with the column.

    Args:
      positions: int32[B, N, 2].
      config: gives the head size D.
      dtype: float32 or wider.

    Returns:
      float[B, N, D/2].
    """
    size = config.hidden_size // config.num_heads // 2
    frequencies = ROPE_THETA ** (-jnp.arange(0, size, 2, dtype=dtype) / size)
    angles = positions[..., None].astype(dtype) * frequencies
    return angles.reshape(*positions.shape[:-1], size)
