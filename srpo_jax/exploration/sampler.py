"""Sampling branches of trees: the image encoded once, the trunk prefilled once, all branches decoded together.

Branches read the trunk's keys and values in place, each up to its own prefix, and grow their own. The random bits of a branch
depend on nothing but its own key, so a branch does not change with its slot, its neighbours or a restart.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax.inputs import Array, Inputs
from srpo_jax.models.attention import CombCache
from srpo_jax.models.logprobs import head_logits, logprobs_of
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How tokens are drawn.

    Attributes:
      max_tokens: token budget of a branch; one that does not end within it is truncated.
      eos_id: the end-of-turn token.
      temperature: 0 for greedy.
    """

    max_tokens: int
    eos_id: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature must be >= 0 and max_tokens >= 1, not {self.temperature}, {self.max_tokens}")


class Samples(NamedTuple):
    """Sampled branches.

    Attributes:
      tokens: int32[B, M, R], end-of-turn included where reached.
      logprobs: float32[B, M, R] under the raw policy, whatever the temperature.
      lengths: int32[B, M], tokens of each branch.
      stopped: bool[B, M], whether the branch reached end-of-turn.
      ties: float32[B, M], the smallest gap between the best and the second-best perturbed logit of the branch's draws. Where
        it is near 0, another batch size or mesh may draw another token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    ties: jax.Array


class DecodeState(NamedTuple):
    """State of the decode loop; `R` is the token budget.

    Attributes:
      step: int32, tokens that every unfinished branch has.
      samples: what has been sampled so far.
      cache: keys and values of trunks and branches, with a leading layer axis.
    """

    step: jax.Array
    samples: Samples
    cache: CombCache


def record_key(round_key: jax.Array, record_id: str) -> jax.Array:
    """The random key of a record; its branches fold in their prefix and their number."""
    return jax.random.fold_in(round_key, np.uint32(zlib.crc32(record_id.encode())))


def branch_keys(record_keys: jax.Array, prefixes: Array, numbers: Array) -> jax.Array:
    """keys[B, M] from record keys [B], prefix indices int32[B, M] and branch numbers within the prefix int32[B, M]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    fold_each = jax.vmap(jax.vmap(jax.random.fold_in))
    return fold_each(fold(record_keys, prefixes), numbers)


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def sample_branches(
    graphdef: nnx.GraphDef, params: dict, trunk: Inputs, limits: jax.Array, keys: jax.Array, config: SampleConfig
) -> Samples:
    """Samples `M` branches of each trunk.

    Args:
      graphdef: of the policy's module.
      params: its parameters.
      trunk: `B` trunks; only the tokens below the largest limit matter.
      limits: int32[B, M], how many trunk tokens each branch continues.
      keys: random keys [B, M].
      config: how tokens are drawn.
    """
    model: Qwen2_5_VL = nnx.merge(graphdef, params)
    hidden, trunk_kv = model.trunk(trunk, model.encode_images(trunk.vision), keep_kv=True)
    last = jnp.take_along_axis(hidden, limits[..., None] - 1, axis=1)
    # A branch continues with text: its first position id follows the largest id of its prefix.
    in_prefix = jnp.arange(trunk.tokens.shape[1]) < limits[..., None]
    start = jnp.max(jnp.where(in_prefix, trunk.positions.max(axis=1)[:, None], -1), axis=-1) + 1

    def draw(state: DecodeState, hidden: jax.Array) -> DecodeState:
        samples = draw_tokens(state, head_logits(hidden, model.output_embedding), keys, config)
        return state._replace(step=state.step + 1, samples=samples)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < config.max_tokens) & ~jnp.all(state.samples.stopped)

    def advance(state: DecodeState) -> DecodeState:
        previous = state.step - 1
        tokens = jax.lax.dynamic_index_in_dim(state.samples.tokens, previous, 2, keepdims=False)
        hidden, cache = model.decode(tokens, start + previous, limits, state.cache, previous)
        return draw(state._replace(cache=cache), hidden)

    assert trunk_kv is not None  # keep_kv
    cache = CombCache.start(trunk_kv, limits.shape[1], config.max_tokens)
    state = draw(empty_state(cache, limits.shape, config), last)
    return jax.lax.while_loop(unfinished, advance, state).samples


def empty_state(cache: CombCache, shape: tuple[int, ...], config: SampleConfig) -> DecodeState:
    """The state before the first token of `shape` = (B, M) branches."""
    budget = (*shape, config.max_tokens)
    return DecodeState(
        step=jnp.int32(0),
        samples=Samples(
            tokens=jnp.zeros(budget, jnp.int32),
            logprobs=jnp.zeros(budget, jnp.promote_types(cache.own_k.dtype, jnp.float32)),
            lengths=jnp.zeros(shape, jnp.int32),
            stopped=jnp.zeros(shape, bool),
            ties=jnp.full(shape, jnp.inf, jnp.float32),
        ),
        cache=cache,
    )


def draw_tokens(state: DecodeState, logits: jax.Array, keys: jax.Array, config: SampleConfig) -> Samples:
    """Draws one token for every branch that has not stopped, by Gumbel-max; logits float32[B, M, V]."""
    samples = state.samples
    perturbed = logits
    if config.temperature > 0:
        step_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, state.step)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32)))(step_keys)
        perturbed = logits / config.temperature + noise
    tokens, gap = best_token(perturbed)
    active = ~samples.stopped

    def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.where(active, new, 0).astype(buffer.dtype)
        return jax.lax.dynamic_update_index_in_dim(buffer, new, state.step, 2)

    return Samples(
        tokens=put(samples.tokens, tokens),
        logprobs=put(samples.logprobs, logprobs_of(logits, tokens)),
        lengths=samples.lengths + active,
        stopped=samples.stopped | (tokens == config.eos_id),
        ties=jnp.where(active, jnp.minimum(samples.ties, gap.astype(samples.ties.dtype)), samples.ties),
    )


def best_token(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best token int32[...] of logits float[..., V], the first of equals, and its lead over the second best."""
    # Two reductions: `lax.top_k` sorts the whole vocabulary on a CPU, which took most of a decoding step.
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    others = jnp.where(jnp.arange(logits.shape[-1]) == token[..., None], -jnp.inf, logits)
    return token, logits.max(axis=-1) - others.max(axis=-1)
