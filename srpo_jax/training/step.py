"""The jitted update, where model and loss meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from srpo_jax import sharding
from srpo_jax.models.attention import BACKENDS
from srpo_jax.models.heads import without_heads
from srpo_jax.models.layers import Remat
from srpo_jax.models.logprobs import CHUNK
from srpo_jax.models.quantize import compute_params
from srpo_jax.models.scoring import tree_scores
from srpo_jax.training.objective import LossConfig, total_loss, tree_view
from srpo_jax.training.state import TrainState, state_shardings
from srpo_jax.trees import TreeBatch

# Statistics that only some questions have, by how their names begin, and the statistic that tells which questions.
OVER = dict.fromkeys(("m_", "length_", "slope_", "margin_", "pair_accuracy"), "has_pairs") | {
    "key_sentence_": "has_key_sentence",
    "head_": "has_safety_label",
}


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the update computes.

    Attributes:
      dtype: of activations and of the copy of the parameters that the model sees.
      remat: what each layer, of the vision tower too, keeps for the backward pass: "none" everything, "selective" the
        products with kernels, "full" its input alone.
      logprob_chunk: positions per chunk of the log-prob head.
      attention: backend of the trees' attention, see `models.attention.tree_attention`.
      image_cache: GiB of each host's memory for the features of images, which then are encoded once and not in every round
        and update; for a frozen vision tower. 0 encodes them each time.

    Raises:
      ValueError: no floating dtype, no such remat, an empty chunk, an unknown backend, or a negative cache.
    """

    dtype: str = "float32"
    remat: Remat = "full"
    logprob_chunk: int = CHUNK
    attention: str = "auto"
    image_cache: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: use 'float32', 'bfloat16' or 'float16'")
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat={self.remat!r}: use 'none', 'selective' or 'full'")
        if self.logprob_chunk < 1:
            raise ValueError(f"logprob_chunk={self.logprob_chunk}: at least 1")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention={self.attention!r}: use one of {', '.join(map(repr, BACKENDS))}")
        if self.image_cache < 0:
            raise ValueError(f"image_cache={self.image_cache}: a number of GiB, 0 for none")


def check_image_cache(state: TrainState, compute: ComputeConfig) -> None:
    """Raises ValueError where features are kept of a vision tower that trains."""
    moving = sorted(path for path in state.params if path.startswith("vision/"))
    if compute.image_cache and moving:
        raise ValueError(
            f"compute.image_cache={compute.image_cache} keeps features of a frozen vision tower, but {len(moving)} of its "
            f"parameters train ({moving[0]}, ...); set it to 0, or leave the tower out of `trainable`"
        )


def tree_loss(
    model: Any,
    batch: TreeBatch,
    config: LossConfig,
    compute: ComputeConfig = ComputeConfig(),
    step: jax.Array | int = 0,
    own: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and statistics of every question of a batch at update `step`, float[B] each.

    `model` is the policy's module; `own` holds the parameters of objectives that have any (`LossConfig.parameters`).
    """
    scores = tree_scores(model, batch, remat=compute.remat, chunk=compute.logprob_chunk, attention=compute.attention)
    return total_loss(tree_view(scores, batch, own), config, step)


def make_update(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    *,
    offload: bool = False,
) -> Update:
    """The compiled update `(state, batches) -> (state, metrics)`.

    `batches` has a leading axis of micro-batches whose gradients add up: every question weighs the same, whatever its
    micro-batch. The old state is donated, save for its frozen parameters. With `offload` the moments come from and go to the
    host's memory.
    """
    dtype = jnp.dtype(compute.dtype)

    def micro_loss(params: dict, frozen: dict, batch: TreeBatch, total: jax.Array, step: jax.Array):
        model = nnx.merge(graphdef, sharding.unflatten(compute_params(without_heads(params | frozen), dtype)))
        per_question, aux = tree_loss(model, batch, loss, compute, step, params)
        return jnp.sum(per_question * batch.weight) / total, question_sums(per_question, aux, batch.weight)

    def update(state: TrainState, frozen: dict[str, jax.Array], batches: TreeBatch):
        total = jnp.sum(batches.weight)
        differentiate = jax.value_and_grad(micro_loss, has_aux=True)

        def add(grads, batch):
            (_, sums), new = differentiate(state.params, frozen, batch, total, state.step)
            return jax.tree.map(jnp.add, grads, new), sums

        grads, sums = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), batches)
        opt_state = state.opt_state
        if offload:  # not before the gradient is done, when activations have left the room
            grads, opt_state = jax.lax.optimization_barrier((grads, opt_state))
            opt_state = jax.device_put(opt_state, state_shardings(state, mesh).opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = mean_metrics(jax.tree.map(lambda x: jnp.sum(x, axis=0), sums))
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        return TrainState(state.step + 1, params, {}, opt_state), metrics

    shardings = state_shardings(state, mesh, offload=offload)._replace(frozen={})
    compiled = jax.jit(update, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    return Update(compiled, mesh)


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update; `lower` takes shapes with shardings instead of arrays, for compilation ahead of time."""

    compiled: Any
    mesh: jax.sharding.Mesh

    def __call__(self, state: TrainState, batches: TreeBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(self.mesh):
            moved, metrics = self.compiled(state.moving(), state.frozen, batches)
        return moved._replace(frozen=state.frozen), metrics

    def lower(self, state: TrainState, batches: TreeBatch) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.compiled.lower(state.moving(), state.frozen, batches)


def question_sums(loss: jax.Array, aux: dict[str, jax.Array], weight: jax.Array) -> dict[str, jax.Array]:
    """Sums over questions from which `mean_metrics` makes means; they add up over micro-batches."""
    sums = {name: jnp.sum(x * (weight * aux[has] if (has := _over(name)) else weight)) for name, x in aux.items()}
    return sums | {"loss": jnp.sum(loss * weight), "questions": jnp.sum(weight)}


def mean_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means per question; those of `OVER` are means over the questions that have them."""
    sums = dict(sums)
    questions = sums.pop("questions")
    return {name: x / (jnp.maximum(sums[has], 1) if (has := _over(name)) else questions) for name, x in sums.items()}


def _over(name: str) -> str | None:
    """The statistic that tells which questions have the statistic `name`; None where all do."""
    return next((has for opening, has in OVER.items() if name.startswith(opening)), None)
