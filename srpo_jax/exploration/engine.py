"""The engine that samples branches, on the device: trees flow through fixed shapes, and no place idles while work waits.

`B` trees decode together, `W` branches of each at a time. A branch that ends hands its place to the next one of its tree,
within the program; a tree whose branches have all ended hands its place to the next tree, prefilled end to end with others.
Two programs serve all trees, `prefill` and `decode`; `scheduler.sample` runs them.

    waiting trees ──prefill──▶ [tree 0: trunk, W branches of M]
                               [tree 1: trunk, W branches of M]  ──decode──▶ finished trees
                               [...                           ]

Branches read the trunk's keys and values in place, each up to its own prefix, and grow their own. At one set of shapes the
tokens and log-probs of a branch are bit for bit a function of its trunk, prefix and key: its place, its neighbours and when it
started do not matter, so nor do order and restarts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from srpo_jax import sharding
from srpo_jax.exploration.sampler import Loops, SampleConfig, draw
from srpo_jax.inputs import Array, PackedInputs, PrefillShape
from srpo_jax.models.decoding import CombCache, KVCache
from srpo_jax.models.logprobs import head_logits, logprobs_of
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL

IDLE = -1


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Static sizes.

    Attributes:
      trees: B, trees that decode together.
      width: W, branches of a tree that decode together.
      branches: M, most branches of a tree.
      prefixes: P, most prefixes of a tree.
      pack: of one prefill; `pack.longest` is the trunk's room.
      int8: whether keys and values are kept as int8.
      gather: whether parameters that `fsdp` splits are gathered before the first token, and held until the last, instead of for
        each token.

    Raises:
      ValueError: a size below 1.
    """

    trees: int
    width: int
    branches: int
    prefixes: int
    pack: PrefillShape
    int8: bool = False
    gather: bool = False

    def __post_init__(self) -> None:
        for name in ("trees", "width", "branches", "prefixes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


class Samples(NamedTuple):
    """Branches of trees.

    Attributes:
      tokens: int32[B, M, R], the token that ended the turn included.
      logprobs: float32[B, M, R] under the raw policy: temperature 1, no truncation.
      lengths: int32[B, M], tokens of each branch; 0 before it has any.
      stopped: bool[B, M], whether the branch ended its turn.
      looped: bool[B, M], whether it was cut as a loop. Neither: it ran into the budget.
      ties: float32[B, M], the smallest lead of a drawn token over the second best (perturbed) logit. Where it is near 0, other
        shapes or another mesh may draw another token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    looped: jax.Array
    ties: jax.Array


class Trees(NamedTuple):
    """What decoding reads of the trees in their places, and never writes.

    Attributes:
      openings: float[B, P, D], the trunk's final hidden state at the end of each prefix.
      limits: int32[B, P], trunk tokens that a branch of the prefix sees.
      starts: int32[B, P], its first position id.
      prefixes: int32[B, M], the prefix of each branch.
      keys: uint32[B, M, ...], random key data of each branch.
      counts: int32[B], branches of the tree.
    """

    openings: Array
    limits: Array
    starts: Array
    prefixes: Array
    keys: Array
    counts: Array


class EngineState(NamedTuple):
    """Everything on the device.

    Attributes:
      trees: see `Trees`.
      cache: keys and values, with a leading layer axis.
      samples: of the trees in their places.
      following: int32[B], the next branch to start.
      branch: int32[B, W], the branch in each place, -1 for none.
      steps: int32[B, W], tokens that it has.
      hidden: float[B, W, D], what its next token is drawn from.
      loops: see `Loops`.
    """

    trees: Trees
    cache: CombCache
    samples: Samples
    following: jax.Array
    branch: jax.Array
    steps: jax.Array
    hidden: jax.Array
    loops: Loops


def empty_state(model: Qwen2_5_VL, shape: EngineShape, config: SampleConfig, mesh: Mesh | None = None) -> EngineState:
    """All places empty."""
    text, dtype = model.config.text, model.embed[...].dtype
    kept = cache_dtype(dtype, mesh)
    b, w, m, p, r = shape.trees, shape.width, shape.branches, shape.prefixes, config.max_tokens

    def cache(*lead: int, length: int) -> KVCache:
        nothing = jnp.zeros((text.num_layers, *lead, length, text.num_kv_heads, text.head_dim), kept)
        return KVCache.of(nothing, nothing, shape.int8)

    key = jax.random.key_data(jax.random.key(0))
    return EngineState(
        trees=Trees(
            openings=jnp.zeros((b, p, text.hidden_size), dtype),
            limits=jnp.zeros((b, p), jnp.int32),
            starts=jnp.zeros((b, p), jnp.int32),
            prefixes=jnp.zeros((b, m), jnp.int32),
            keys=jnp.zeros((b, m, *key.shape), key.dtype),
            counts=jnp.zeros((b,), jnp.int32),
        ),
        cache=CombCache(cache(b, length=shape.pack.longest), cache(b, w, length=r)),
        samples=empty_samples((b, m), r, jnp.promote_types(dtype, jnp.float32)),
        following=jnp.zeros((b,), jnp.int32),
        branch=jnp.full((b, w), IDLE, jnp.int32),
        steps=jnp.zeros((b, w), jnp.int32),
        hidden=jnp.zeros((b, w, text.hidden_size), dtype),
        loops=Loops.start((b, w)),
    )


def cache_dtype(dtype: Any, mesh: Mesh | None) -> Any:
    """Of cached keys and values: the policy's, on a CPU float32 at least.

    XLA has no 16-bit arithmetic for CPUs. It would widen the whole cache for every token that is written and for every
    product, which made decoding 70 times slower. The numbers are the same: they are rounded before they are kept.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jnp.promote_types(dtype, jnp.float32) if platform == "cpu" else dtype


def empty_samples(shape: tuple[int, ...], budget: int, dtype: Any) -> Samples:
    """Samples [*shape] without tokens."""
    return Samples(
        tokens=jnp.zeros((*shape, budget), jnp.int32),
        logprobs=jnp.zeros((*shape, budget), dtype),
        lengths=jnp.zeros(shape, jnp.int32),
        stopped=jnp.zeros(shape, bool),
        looped=jnp.zeros(shape, bool),
        ties=jnp.full(shape, jnp.inf, jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "shape", "config", "mesh"))
def start(
    graphdef: nnx.GraphDef, params: dict, shape: EngineShape, config: SampleConfig, mesh: Mesh | None
) -> EngineState:
    """`empty_state` on the mesh."""
    return _placed(empty_state(nnx.merge(graphdef, params), shape, config, mesh), mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="state")
def prefill(
    graphdef: nnx.GraphDef,
    params: dict,
    state: EngineState,
    packs: PackedInputs,
    new: Trees,
    places: Array,
    mesh: Mesh | None,
) -> EngineState:
    """Puts new trees into their places.

    Args:
      graphdef: of the policy's module.
      params: its parameters.
      state: the engine's; donated.
      packs: the trunks, `n` to each of `G` groups of places, with a leading axis G.
      new: of those trees [G, n]; `openings` holds the index of the last token of each prefix in its pack, int32[G, n, P].
      places: int32[G, n], each tree's place within its group; a place that does not exist for none.
      mesh: over which groups are split, or None.
    """
    model: Qwen2_5_VL = nnx.merge(graphdef, params)
    hidden, (k, v) = jax.vmap(model.prefill, out_axes=(0, 1))(packs)
    new = new._replace(openings=jax.vmap(jnp.take, (0, 0, None))(hidden, new.openings, 0))
    trunk = KVCache.of(k, v, state.cache.trunk.key_scales is not None)
    put = functools.partial(_put, places=places)
    budget = state.samples.tokens.shape[-1]
    lanes = (*places.shape, state.branch.shape[-1])
    samples = empty_samples((*places.shape, state.samples.lengths.shape[-1]), budget, state.samples.logprobs.dtype)
    state = state._replace(
        trees=jax.tree.map(put, state.trees, new),
        cache=state.cache._replace(trunk=jax.tree.map(functools.partial(put, axis=1), state.cache.trunk, trunk)),
        samples=jax.tree.map(put, state.samples, samples),
        following=put(state.following, jnp.zeros(places.shape, jnp.int32)),
        branch=put(state.branch, jnp.full(lanes, IDLE, jnp.int32)),
    )
    return _placed(state, mesh)


def _put(old: jax.Array, new: jax.Array, places: Array, axis: int = 0) -> jax.Array:
    """`old` [.., B, ..] with `new` [.., G, n, ..] in its places int32[G, n]; both have G groups along `axis`."""
    grouped = old.reshape(*old.shape[:axis], places.shape[0], -1, *old.shape[axis + 1 :])

    def one(old: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
        return old.at[(*(slice(None),) * axis, places)].set(new.astype(old.dtype), mode="drop")

    return jax.vmap(one, (axis, axis, 0), axis)(grouped, new, jnp.asarray(places)).reshape(old.shape)


class Pulse(NamedTuple):
    """What the host must know after some decoding.

    Attributes:
      busy: bool[B], whether a tree has unfinished branches.
      active: bool[], whether any has.
      hungry: bool[], whether enough places are empty for trees that wait.
      ticks: int32[], tokens that every place could have drawn.
    """

    busy: jax.Array
    active: jax.Array
    hungry: jax.Array
    ticks: jax.Array


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "mesh", "ticks"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef,
    params: dict,
    state: EngineState,
    appetite: Array,
    config: SampleConfig,
    mesh: Mesh | None,
    ticks: int,
) -> tuple[EngineState, Pulse]:
    """Draws up to `ticks` tokens of every branch; stops early when nothing is left or places should be refilled.

    Args:
      graphdef: of the policy's module.
      params: its parameters.
      state: the engine's; donated.
      appetite: float32[B]; decoding stops when those of the empty places add up to 1.
      config: how tokens are drawn.
      mesh: of the state, or None.
      ticks: most tokens.
    """
    model: Qwen2_5_VL = nnx.merge(graphdef, params)

    def pulse(ticks: jax.Array, state: EngineState) -> Pulse:
        busy = (state.following < state.trees.counts) | jnp.any(state.branch != IDLE, axis=1)
        return Pulse(busy, jnp.any(busy), jnp.sum(jnp.where(busy, 0, appetite)) > 1 - 1e-3, ticks)

    def going(carry: tuple[jax.Array, EngineState]) -> jax.Array:
        now = pulse(*carry)
        return (now.ticks < ticks) & now.active & ~now.hungry

    drawn, state = jax.lax.while_loop(
        going, lambda carry: (carry[0] + 1, tick(model, carry[1], config)), (jnp.int32(0), state)
    )
    return _placed(state, mesh), pulse(drawn, state)


def tick(model: Qwen2_5_VL, state: EngineState, config: SampleConfig) -> EngineState:
    """One more token of every branch, after branches that wait have taken the empty places of their trees."""
    state = assign(state)
    trees, branch, steps = state.trees, state.branch, state.steps
    logits = head_logits(state.hidden, model.output_embedding)
    keys = jax.random.wrap_key_data(_pick(trees.keys, branch))
    drawn = draw(logits.reshape(-1, logits.shape[-1]), keys.reshape(-1), steps.reshape(-1), config)
    tokens, ties = (x.reshape(branch.shape) for x in drawn)
    loops = state.loops.add(tokens)
    stopped = jnp.isin(tokens, jnp.asarray(config.stop_ids, jnp.int32))
    looped = loops.found(config.loop_tokens) & ~stopped
    samples = record(state, tokens, logprobs_of(logits, tokens), stopped, looped, ties)
    prefix = _pick(trees.prefixes, branch)
    hidden, cache = model.decode(
        tokens, _pick(trees.starts, prefix) + steps, _pick(trees.limits, prefix), state.cache, steps
    )
    ended = stopped | looped | (steps + 1 >= config.max_tokens)
    return state._replace(
        cache=cache,
        samples=samples,
        branch=jnp.where(ended, IDLE, branch),
        steps=steps + 1,
        hidden=hidden,
        loops=loops,
    )


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of every tree b, `x[b, index[b]]`: [B, W, ...] of x [B, N, ...] and index int32[B, W].

    As a map over trees, which the partitioner leaves where they are; of `x[rows, index]` it gathers all of them first.
    """
    return jax.vmap(lambda one, where: one[where])(x, index)


def assign(state: EngineState) -> EngineState:
    """Starts the next branches of each tree in its empty places."""
    free = state.branch == IDLE
    candidate = state.following[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
    fresh = free & (candidate < state.trees.counts[:, None])
    branch = jnp.where(fresh, candidate, state.branch)
    opening = _pick(state.trees.openings, _pick(state.trees.prefixes, branch))
    none = Loops.start(branch.shape)
    return state._replace(
        following=state.following + jnp.sum(fresh, axis=1, dtype=jnp.int32),
        branch=branch,
        # An idle place goes on computing on what it has; its step stays in range and nothing of it is recorded.
        steps=jnp.where(fresh | free, 0, state.steps),
        hidden=jnp.where(fresh[..., None], opening, state.hidden),
        loops=jax.tree.map(lambda start, now: jnp.where(fresh[..., None], start, now), none, state.loops),
    )


def record(state: EngineState, tokens, logprobs, stopped, looped, ties) -> Samples:
    """The samples with one more token [B, W] of every branch that is in a place."""
    old = state.samples
    branch = jnp.where(state.branch == IDLE, old.lengths.shape[1], state.branch)  # out of range: dropped

    def put(buffer: jax.Array, new: jax.Array, *step: jax.Array) -> jax.Array:
        def one(buffer: jax.Array, new: jax.Array, *where: jax.Array) -> jax.Array:  # of one tree, see `_pick`
            return buffer.at[where].set(new, mode="drop")

        return jax.vmap(one)(buffer, new.astype(buffer.dtype), branch, *step)

    def least(old: jax.Array, new: jax.Array, where: jax.Array) -> jax.Array:
        return old.at[where].min(new.astype(old.dtype), mode="drop")

    return Samples(
        tokens=put(old.tokens, tokens, state.steps),
        logprobs=put(old.logprobs, logprobs, state.steps),
        lengths=put(old.lengths, state.steps + 1),
        stopped=put(old.stopped, stopped),
        looped=put(old.looped, looped),
        ties=jax.vmap(least)(old.ties, ties, branch),
    )


def _placed(state: EngineState, mesh: Mesh | None) -> EngineState:
    return state if mesh is None else jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def state_shardings(state: EngineState, mesh: Mesh) -> EngineState:
    """The state, or its shapes, over the mesh: trees over its data axes, key/value heads over its tensor axis."""
    split = jax.tree.map(lambda _: sharding.batch_sharding(mesh), state)
    trunk = jax.tree.map(lambda x: sharding.cache_sharding(mesh, x.shape, 2), state.cache.trunk)
    own = jax.tree.map(lambda x: sharding.cache_sharding(mesh, x.shape, 3), state.cache.own)
    return split._replace(cache=CombCache(trunk, own))
