"""How a token is drawn: from the raw logits of a branch and its own random key, by Gumbel-max."""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.inputs import Array

LONGEST_PERIOD = 32


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How tokens are drawn, in the order of the fields: temperature, then the filters top-k, top-p, min-p on what it leaves.

    Attributes:
      max_tokens: token budget of a branch; one that does not end within it is truncated.
      stop_ids: tokens that end a turn.
      temperature: 0 for greedy.
      top_k: keep the `top_k` likeliest tokens, and those as likely as the last of them; 0 keeps all.
      top_p: keep the likeliest tokens until they hold at least this mass; 1 keeps all.
      min_p: keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
      loop_tokens: a branch is a loop, and ends, when each of its last `loop_tokens` tokens equals the one a period before it,
        for any period up to 32; 0 lets loops run into the budget.

    Raises:
      ValueError: a field out of its range.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    loop_tokens: int = 64

    def __post_init__(self) -> None:
        good = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "loop_tokens": self.loop_tokens >= 0,
        }
        if bad := [f"{name}={getattr(self, name)}" for name, fine in good.items() if not fine]:
            raise ValueError(
                f"{', '.join(bad)}: max_tokens is at least 1, temperature, top_k and loop_tokens at least 0, top_p in (0, 1], "
                "min_p in [0, 1]"
            )


def record_key(round_key: jax.Array, record_id: str) -> jax.Array:
    """The random key of a record; its branches fold in their prefix and their number."""
    return jax.random.fold_in(round_key, np.uint32(zlib.crc32(record_id.encode())))


@jax.jit
def branch_keys(record_key: jax.Array, prefixes: Array, numbers: Array) -> jax.Array:
    """keys[M] from the record's key, prefix indices int32[M] and branch numbers within the prefix int32[M]."""
    fold = jax.random.fold_in
    return jax.vmap(fold)(jax.vmap(fold, (None, 0))(record_key, prefixes), numbers)


def draw(logits: jax.Array, keys: jax.Array, steps: jax.Array, config: SampleConfig) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: float32[N, V], raw.
      keys: the rows' random keys [N].
      steps: int32[N], tokens that each row has drawn before; with the key they make the random bits.
      config: how.

    Returns:
      Tokens int32[N], and by how much each one's perturbed logit leads the second best, float32[N].
    """
    if config.temperature == 0:
        return best_token(logits)
    scaled = keep_likely(logits / config.temperature, config)
    noise = jax.vmap(lambda key, step: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[-1:], jnp.float32))
    return best_token(scaled + noise(keys, steps))


def keep_likely(logits: jax.Array, config: SampleConfig) -> jax.Array:
    """`logits` float[N, V], those that top-k, top-p and min-p drop set to −inf. Equal logits are kept or dropped together."""

    def drop(logits: jax.Array, least: jax.Array) -> jax.Array:
        return jnp.where(logits < least, -jnp.inf, logits)

    if 0 < config.top_k < logits.shape[-1]:
        logits = drop(logits, largest_with(logits, jnp.ones_like(logits), config.top_k))
    if config.top_p < 1:
        logits = drop(logits, largest_with(logits, jax.nn.softmax(logits, axis=-1), config.top_p))
    if config.min_p > 0:
        logits = drop(logits, logits.max(axis=-1, keepdims=True) + np.log(config.min_p))
    return logits


def largest_with(logits: jax.Array, weights: jax.Array, enough: float) -> jax.Array:
    """The largest threshold t, float32[N, 1], at which the weights of the logits >= t add up to `enough`.

    Bisection over the ordered bit patterns of float32: exact in 32 reductions, where a sort of the vocabulary would be slower.
    """
    order = _ordered(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at `low`, not at `high`
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        held = jnp.sum(jnp.where(order >= middle, weights, 0), axis=-1, keepdims=True) >= enough
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    low = _ordered(jnp.full_like(logits[..., :1], -jnp.inf))
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, order.max(axis=-1, keepdims=True) + 1))
    return _unordered(low)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 that sort like the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _unordered(order: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ jnp.int32(0x7FFFFFFF), order), jnp.float32)


def best_token(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best token int32[...] of logits float[..., V], the first of equals, and its lead over the second best."""
    # Two reductions: `lax.top_k` sorts the whole vocabulary on a CPU, which took most of a decoding step.
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    others = jnp.where(jnp.arange(logits.shape[-1]) == token[..., None], -jnp.inf, logits)
    return token, logits.max(axis=-1) - others.max(axis=-1)


class Loops(NamedTuple):
    """Watches branches for loops; one entry per period 1 .. 32.

    Attributes:
      last: int32[..., 32], the token `period` before the next one.
      runs: int32[..., 32], how many tokens in a row have equalled the one `period` before them.
    """

    last: jax.Array
    runs: jax.Array

    @staticmethod
    def start(shape: tuple[int, ...]) -> Loops:
        """Of branches without tokens."""
        return Loops(jnp.full((*shape, LONGEST_PERIOD), -1, jnp.int32), jnp.zeros((*shape, LONGEST_PERIOD), jnp.int32))

    def add(self, tokens: jax.Array) -> Loops:
        """After the next token int32[...] of every branch."""
        runs = jnp.where(self.last == tokens[..., None], self.runs + 1, 0)
        return Loops(jnp.concatenate([tokens[..., None], self.last[..., :-1]], axis=-1), runs)

    def found(self, tokens: int) -> jax.Array:
        """bool[...], whether some run is `tokens` long."""
        return jnp.any(self.runs >= tokens, axis=-1) if tokens else jnp.zeros(self.runs.shape[:-1], bool)
