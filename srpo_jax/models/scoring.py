"""Per-token log-probs of whole trees: one image encode and one trunk forward per tree."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax import sharding
from srpo_jax.models.attention import weighted_values
from srpo_jax.models.layers import Remat
from srpo_jax.models.logprobs import CHUNK, token_logprobs
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, TreeBatch, pack_trees


class TreeScores(NamedTuple):
    """What one forward pass tells of B packed trees; meaningless beyond the lengths that the batch tells.

    Attributes:
      path: float32[B, A], log π of the tokens of path and reply.
      branch: float32[B, M, L], of the branches.
      key: float32[B, A], of the key step from the path before it alone, the query hidden; None unless the batch asks.
      means: float32[B, 2, D], mean final hidden states of what stands before the key step, with the prompt and without; None
        unless the batch asks.
    """

    path: jax.Array
    branch: jax.Array
    key: jax.Array | None
    means: jax.Array | None


def tree_logprobs(
    model: Qwen2_5_VL, batch: TreeBatch, *, remat: Remat = "none", chunk: int = CHUNK, attention: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """log π of every token of the reference path and of every branch: see `tree_scores`."""
    scores = tree_scores(model, batch, remat=remat, chunk=chunk, attention=attention)
    return scores.path, scores.branch


def tree_scores(
    model: Qwen2_5_VL, batch: TreeBatch, *, remat: Remat = "none", chunk: int = CHUNK, attention: str = "auto"
) -> TreeScores:
    """What the objectives read of a forward pass over packed trees.

    Args:
      model: the policy's module.
      batch: packed trees.
      remat: what each layer keeps for the backward pass (see `layers.rematerialised`).
      chunk: positions of a buffer per chunk of the log-prob head.
      attention: backend, see `models.attention.tree_attention`.
    """
    features = model.encode_images(batch.vision, remat=remat)
    hidden = model.comb(batch.rows, features, remat=remat, backend=attention)
    buffers = hidden.shape[0]
    hidden = hidden.reshape(buffers, -1, hidden.shape[-1])
    picked = jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
    scores = token_logprobs(picked, model.output_embedding, batch.targets, chunk)

    def of(slots: jax.Array, length: int) -> jax.Array:
        at = jnp.minimum(slots[..., None] + jnp.arange(length), scores.shape[1] - 1)
        return jnp.take_along_axis(scores, at.reshape(buffers, -1), axis=1).reshape(at.shape)

    path, branch = of(batch.path_slots, batch.path_targets.shape[1]), of(batch.branch_slots, batch.tokens.shape[2])
    key = None if batch.key_slots is None else of(batch.key_slots, batch.path_targets.shape[1])
    means = None if batch.understanding is None else span_means(hidden, batch.understanding)
    return TreeScores(path, branch, key, means)


def span_means(hidden: jax.Array, spans: jax.Array) -> jax.Array:
    """Means of hidden states over spans of their buffers, 0 over none: float32[B, S, D], or wider.

    Args:
      hidden: float[G, T, D].
      spans: int32[B, S, 2], from and to, B / G trees in each buffer.
    """
    of_buffer = jnp.reshape(spans, (len(hidden), -1, 2))
    token = jnp.arange(hidden.shape[1])
    inside = (token >= of_buffer[..., :1]) & (token < of_buffer[..., 1:])
    sums = weighted_values("gst,gtd->gsd", inside.astype(hidden.dtype), hidden)
    means = sums / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1)
    return means.reshape(*spans.shape[:2], -1)


def score_trees(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Any],
    trees: Sequence[ReasoningTree],
    pack: PackConfig,
    batch: int,
    *,
    chunk: int = CHUNK,
    attention: str = "auto",
) -> Iterator[list[np.ndarray]]:
    """log π of the tokens of all branches of given trees, whoever wrote them: packed as an update packs, forward alone.

    In a job of several processes all call with the same trees, and all get the log-probs of all of them.

    Args:
      graphdef: of the policy's module.
      params: its parameters; on a mesh, trees are split over its data axes.
      trees: verdicts do not matter.
      pack: shapes; those of an update give the programs' shapes of that update.
      batch: trees scored together, on a mesh a multiple of its data × fsdp.
      chunk: see `tree_logprobs`.
      attention: see `tree_logprobs`.

    Yields:
      For each tree, in order, float32[n] of each branch, in order: raw policy, temperature 1.

    Raises:
      ValueError: a tree that exceeds the largest shapes; names its record.
    """
    mesh = sharding.mesh_of(params)
    buffers = 1 if mesh is None else sharding.batch_parts(mesh)
    pack = dataclasses.replace(pack, extras=(), substitutes=False, max_pairs=1)
    for start in range(0, len(trees), batch):
        part = [_alike(tree) for tree in trees[start : start + batch]]
        packed, _ = pack_trees([tree for tree, _ in part], pack, size=batch, buffers=buffers)
        if mesh is not None:
            packed = sharding.place(packed, sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            scores = _branch_logprobs(graphdef, params, packed, chunk=chunk, attention=attention)
            scores = sharding.to_host(scores)
        for (_, places), row in zip(part, scores, strict=False):
            yield [row[place, :length] for place, length in places]


def _alike(tree: ReasoningTree) -> tuple[ReasoningTree, list[tuple[int, int]]]:
    """The distinct branches of a tree, one verdict for all so that packing keeps them, and where each branch is: (index,
    length)."""
    distinct: dict[tuple[int, bytes], int] = {}
    kept: list[Branch] = []
    for branch in tree.branches:
        key = branch.prefix, branch.tokens.tobytes()
        if key not in distinct:
            distinct[key] = len(kept)
            kept.append(dataclasses.replace(branch, verdict=True, logprobs=np.zeros(len(branch.tokens), np.float32)))
    places = [(distinct[b.prefix, b.tokens.tobytes()], len(b.tokens)) for b in tree.branches]
    return dataclasses.replace(tree, branches=tuple(kept)), places


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk", "attention"))
def _branch_logprobs(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], batch: TreeBatch, *, chunk: int, attention: str
) -> jax.Array:
    return tree_logprobs(nnx.merge(graphdef, params), batch, chunk=chunk, attention=attention)[1]
