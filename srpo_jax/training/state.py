"""The state of a run: step, parameters (trainable and frozen apart), optimizer."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from srpo_jax import sharding
from srpo_jax.models.heads import without_heads
from srpo_jax.models.lora import is_adapter
from srpo_jax.models.quantize import is_constant

Flat = dict[str, jax.Array]
Patterns = tuple[str, ...] | None


class TrainState(NamedTuple):
    """A pytree that holds all that an update changes, and the parameters that it does not.

    Attributes:
      step: int32 scalar, updates done.
      params: trainable parameters by path, in float32 or wider: the policy's and those of objectives (`models.heads`).
      frozen: the other parameters by path.
      opt_state: of the optimizer, for `params` alone.
    """

    step: jax.Array
    params: Flat
    frozen: Flat
    opt_state: Any

    def all_params(self) -> dict[str, Any]:
        """The policy's parameters, the nested dict that `nnx.merge` takes."""
        return sharding.unflatten(without_heads(self.params | self.frozen))

    def moving(self) -> TrainState:
        """The state without frozen parameters: what an update changes, and what a checkpoint holds."""
        return self._replace(frozen={})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, cosine or constant schedule, and clipping by the global norm.

    Attributes:
      learning_rate: peak.
      steps: length of the whole schedule in updates.
      warmup: updates of linear warm-up.
      schedule: "cosine" (to `final` × peak) or "constant".
      final: see schedule.
      weight_decay: on matrices; norms and biases have none.
      clip: largest global gradient norm; 0 does not clip.
      b1: decay of the first moment.
      b2: decay of the second moment.
      offload: keep the moments in the host's memory between updates; each update fetches them when its gradient is done.

    Raises:
      ValueError: an unknown schedule, or a warm-up that is longer than it.
    """

    learning_rate: float
    steps: int
    warmup: int = 0
    schedule: str = "cosine"
    final: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.99
    offload: bool = False

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant") or self.warmup > self.steps:
            raise ValueError(
                f"schedule={self.schedule!r} with warmup={self.warmup} of {self.steps} steps: use 'cosine' "
                "or 'constant' and a warm-up within the steps"
            )

    def learning_rates(self) -> optax.Schedule:
        """Learning rate by update."""
        end = self.learning_rate * (self.final if self.schedule == "cosine" else 1.0)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / max(1, self.warmup),
            peak_value=self.learning_rate,
            warmup_steps=self.warmup,
            decay_steps=max(self.steps, self.warmup + 1),
            end_value=end,
        )

    def make(self) -> optax.GradientTransformation:
        """The optimizer; works on parameters by path."""
        adam = optax.adamw(
            self.learning_rates(),
            self.b1,
            self.b2,
            weight_decay=self.weight_decay,
            mask=lambda p: {k: decays(k) for k in p},
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), adam) if self.clip else adam


def decays(path: str) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return path.rsplit("/", 1)[-1] in ("kernel", "embed", "head", "lora_a", "lora_b")


def select_trainable(params: dict[str, Any], patterns: Patterns) -> tuple[Flat, Flat]:
    """Splits parameters by path: those that any regular expression finds are trainable. Trainable ones become float32.

    Without patterns the adapters are trainable, or everything where there are none. Scales of adapters and of quantised
    kernels never are.

    Raises:
      ValueError: a pattern that finds no parameter (lists what there is), quantised kernels that should train, or adapters of
        which none does.
    """
    flat = sharding.flatten(params)
    paths = [path for path in sorted(flat) if not is_constant(path)]
    adapters = [path for path in paths if is_adapter(path)]
    for pattern in patterns or ():
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"trainable={pattern!r} matches no parameter; there are {paths}")
    chosen = {path for path in paths if any(re.search(pattern, path) for pattern in patterns or ())}
    if patterns is None:
        chosen = set(adapters or paths)
    if quantised := [path for path in sorted(chosen) if not jnp.issubdtype(flat[path].dtype, jnp.floating)]:
        raise ValueError(
            f"trainable={patterns} reaches quantised kernels, which cannot move: {quantised}; train adapters"
        )
    if adapters and chosen.isdisjoint(adapters):
        raise ValueError(
            f"trainable={patterns} moves none of the adapters; add 'lora', or merge them into the base first"
        )
    trainable = {path: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for path, x in flat.items() if path in chosen}
    return trainable, {path: x for path, x in flat.items() if path not in chosen}


def init_state(
    params: dict[str, Any],
    optimizer: optax.GradientTransformation,
    patterns: Patterns,
    mesh: jax.sharding.Mesh,
    *,
    own: Mapping[str, Any] = types.MappingProxyType({}),
    offload: bool = False,
) -> TrainState:
    """A fresh state on the mesh; optimizer state is split like the parameters that it belongs to.

    `own` are parameters of objectives by path (`LossConfig.parameters`), which train whatever the patterns say. Trainable
    parameters are copied, because updates donate them; frozen ones are shared with `params` where they need not move.
    """
    trainable, frozen = select_trainable(params, patterns)
    trainable |= own
    shardings = state_shardings(
        TrainState(jnp.int32(0), trainable, frozen, jax.eval_shape(optimizer.init, trainable)), mesh, offload=offload
    )
    trainable = jax.device_put(trainable, shardings.params, may_alias=False)
    frozen = jax.device_put(frozen, shardings.frozen)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), trainable, frozen, opt_state)


def place_frozen(params: dict[str, Any], like: Flat) -> Flat:
    """The frozen parameters of a state, placed as in `like` (from `abstract_state`), shared where they need not move."""
    flat = sharding.flatten(params)
    return {path: jax.device_put(flat[path], x.sharding) for path, x in like.items()}


def abstract_state(
    shapes: dict[str, Any],
    optimizer: optax.GradientTransformation,
    patterns: Patterns,
    mesh: jax.sharding.Mesh,
    *,
    own: Mapping[str, Any] = types.MappingProxyType({}),
    offload: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, from shapes of parameters and without allocating any."""

    def make(params: dict[str, Any]) -> TrainState:
        trainable, frozen = select_trainable(params, patterns)
        trainable |= {path: jnp.asarray(x) for path, x in own.items()}
        return TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable))

    state = jax.eval_shape(make, shapes)
    placed = state_shardings(state, mesh, offload=offload)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, placed)


def state_shardings(state: Any, mesh: jax.sharding.Mesh, *, offload: bool = False) -> Any:
    """NamedShardings for a `TrainState` of arrays or shapes: parameters and their moments by the table, the rest whole.

    With `offload` the moments are in the host's memory.
    """
    table = {**state.params, **state.frozen}

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        if name in table and leaf.shape == table[name].shape:
            kind = "pinned_host" if offload and getattr(path[0], "name", "") == "opt_state" else None
            return jax.sharding.NamedSharding(mesh, sharding.spec_of(name, leaf.shape, mesh), memory_kind=kind)
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
