"""What every loss reads: per-token log-probs of paths and branches, and what is known of the branches.

Shapes: `B` questions, `A` path tokens, `M` branches, `L` tokens of a branch. A loss returns float[B], one value per
question, to be averaged over questions by its caller, and statistics float[B].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

M_CEILING = -1e-4  # m closer to 0 than this has unbounded odds; it is clamped there and its gradient is 0


class BranchLogprobs(NamedTuple):
    """Per-token log-probs of a question's branches, and what is known of the branches.

    Attributes:
      logprobs: float[B, M, L], log π of each token; anything beyond `lengths`.
      lengths: int32[B, M], tokens of each branch, 0 for padding.
      prefixes: int32[B, M], the prefix that each branch continues, -1 for padding.
      pairs: bool[B, M, M], [b+, b-] True where favourable b+ is compared with unfavourable b-. Only branches of one
        prefix may be paired.
      tokens: int32[B, M, L], the tokens themselves; for `mask_shared_opening`.
      verdicts: int[B, M], 1 favourable, 0 unfavourable, -1 padding; for losses of single branches.
      reference: float[B, M, L], log-probs under the reference model; for losses that stay near one.
      sampled: float[B, M, L], log-probs under the policy that sampled the branch; for importance ratios.
      counts: int32[B, M], how many identical samples the branch stands for, 0 for what was not sampled; for group
        statistics.
      step_lengths: int32[B, M], tokens of the branch's first own step; for losses of single steps.
    """

    logprobs: jax.Array
    lengths: jax.Array
    prefixes: jax.Array
    pairs: jax.Array
    tokens: jax.Array | None = None
    verdicts: jax.Array | None = None
    reference: jax.Array | None = None
    sampled: jax.Array | None = None
    counts: jax.Array | None = None
    step_lengths: jax.Array | None = None


def needed(branches: BranchLogprobs, name: str, who: str) -> jax.Array:
    """The field `name`; ValueError that names the loss `who` where it is missing."""
    value = getattr(branches, name)
    if value is None:
        raise ValueError(f"{who} needs BranchLogprobs.{name}")
    return value


def at_least(name: str, value: float, bound: float = 0.0, *, strict: bool = False) -> None:
    """ValueError for a static option below its bound; a traced one is its caller's business."""
    if isinstance(value, int | float) and not (value > bound if strict else value >= bound):
        raise ValueError(f"{name}={value}: it must be {'more than' if strict else 'at least'} {bound:g}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError for an option that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, choices))}")


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Mean of `x` where `mask`, 0 where nothing is; what is masked out does not reach the gradient."""
    count = jnp.sum(mask, axis=axis)
    return jnp.sum(jnp.where(mask, x, 0), axis=axis) / jnp.maximum(count, 1)


def token_mask(branches: BranchLogprobs) -> jax.Array:
    """bool[B, M, L]: the tokens that are real."""
    return jnp.arange(branches.logprobs.shape[-1]) < branches.lengths[..., None]


def log_odds(m: jax.Array) -> jax.Array:
    """`m − log(1 − e^m)` for a mean log-prob m < 0, clamped at `M_CEILING` with zero gradient beyond."""
    m = jnp.minimum(m, M_CEILING)
    near = m > -jnp.log(2.0)  # Mächler (2012): each form is exact on its side; both get a safe argument
    log1mexp = jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, m, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, m)))
    )
    return m - log1mexp


def sequence_mean(branches: BranchLogprobs) -> jax.Array:
    """m(b): float[B, M], mean log-prob of each branch (0 for padding)."""
    return masked_mean(branches.logprobs, token_mask(branches))


def log_ratio(branches: BranchLogprobs, who: str, *, normalise: bool = False) -> jax.Array:
    """log π(b) − log π_ref(b): float[B, M], per token if `normalise` (0 for padding)."""
    ratio = branches.logprobs - jax.lax.stop_gradient(needed(branches, "reference", who))
    mask = token_mask(branches)
    return masked_mean(ratio, mask) if normalise else jnp.sum(jnp.where(mask, ratio, 0), axis=-1)


def pair_weights(pairs: jax.Array, prefixes: jax.Array, balance: str = "prefix") -> jax.Array:
    """float[B, M, M] weights of the pairs, summing to 1 per question that has one.

    `balance="prefix"`: prefixes with a pair weigh the same, and so do the pairs of a prefix. `balance="pair"`: all
    pairs of a question weigh the same (RPO's released code).
    """
    one_of("balance", balance, ("prefix", "pair"))
    per_branch = jnp.sum(pairs, axis=-1)
    if balance == "pair":
        return pairs / jnp.maximum(jnp.sum(per_branch, axis=-1), 1)[..., None, None]
    same = same_prefix(prefixes)
    per_prefix = jnp.sum(jnp.where(same, per_branch[..., None, :], 0), axis=-1)  # |P_i| of each branch's prefix
    first = first_of_prefix(same)
    count = jnp.sum(first & (per_prefix > 0) & (prefixes >= 0), axis=-1)
    return pairs / jnp.maximum(per_prefix * count[..., None], 1)[..., None]


def same_prefix(prefixes: jax.Array) -> jax.Array:
    """bool[B, M, M]: which branches share a prefix."""
    return prefixes[..., :, None] == prefixes[..., None, :]


def first_of_prefix(same: jax.Array) -> jax.Array:
    """bool[B, M]: the first branch of each prefix, given which branches share one (bool[B, M, M])."""
    earlier = jnp.tri(same.shape[-1], k=-1, dtype=bool)
    return ~jnp.any(same & earlier, axis=-1)


def shared_opening(branches: BranchLogprobs) -> jax.Array:
    """int32[B, M, M]: how many leading tokens each two branches have in common."""
    tokens, lengths = needed(branches, "tokens", "mask_shared_opening"), branches.lengths
    both = jnp.minimum(lengths[..., :, None], lengths[..., None, :])
    equal = tokens[..., :, None, :] == tokens[..., None, :, :]
    equal &= jnp.arange(tokens.shape[-1]) < both[..., None]
    return jnp.sum(jnp.cumprod(equal.astype(jnp.int32), axis=-1), axis=-1)


def pair_means(branches: BranchLogprobs, *, mask_shared_opening: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m of both sides of every pair, and which pairs remain.

    With `mask_shared_opening` the tokens that the two share at their start do not count (RPO's released code); a pair
    of which one side is the other's opening has nothing left to compare and is dropped.

    Returns:
      m(b+) and m(b-) as float[B, M, M] (broadcast if nothing is masked), and bool[B, M, M].
    """
    if not mask_shared_opening:
        m = sequence_mean(branches)
        shape = branches.pairs.shape
        return jnp.broadcast_to(m[..., :, None], shape), jnp.broadcast_to(m[..., None, :], shape), branches.pairs
    sums = jnp.cumsum(jnp.where(token_mask(branches), branches.logprobs, 0), axis=-1)
    sums = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], axis=-1)
    shared = shared_opening(branches)
    lengths = branches.lengths[..., :, None]
    rest = lengths - shared
    opening = jnp.take_along_axis(sums, shared, axis=-1)
    m = (sums[..., -1:] - opening) / jnp.maximum(rest, 1)
    kept = branches.pairs & (rest > 0) & (jnp.swapaxes(rest, -1, -2) > 0)
    return m, jnp.swapaxes(m, -1, -2), kept


def pair_statistics(
    branches: BranchLogprobs, *, mask_shared_opening: bool = False, means: tuple | None = None
) -> dict[str, jax.Array]:
    """What explains a run, whatever its loss: float[B] each, no gradient.

    Odds reward predictable filler as m nears 0: watch lengths, slopes and the clamped count.
    """
    means = means or pair_means(branches, mask_shared_opening=mask_shared_opening)
    plus, minus, kept = jax.lax.stop_gradient(means)
    both = (-2, -1)
    lengths = jnp.broadcast_to(branches.lengths[..., :, None], kept.shape)
    same = same_prefix(branches.prefixes)
    first = first_of_prefix(same)
    paired = jnp.any(same & jnp.any(kept, axis=-1)[..., None, :], axis=-1)
    clamped = (plus > M_CEILING).astype(jnp.int32) + (minus > M_CEILING)
    slope = 1 / -jnp.expm1(jnp.minimum(plus, M_CEILING))
    return {
        "m_favourable": masked_mean(plus, kept, both),
        "m_unfavourable": masked_mean(minus, kept, both),
        "length_favourable": masked_mean(lengths, kept, both),
        "length_unfavourable": masked_mean(jnp.swapaxes(lengths, -1, -2), kept, both),
        "slope_favourable": masked_mean(slope, kept, both),
        "pair_accuracy": masked_mean(plus > minus, kept, both),
        "pairs": jnp.sum(kept, axis=both),
        "pairs_fully_shared": jnp.sum(branches.pairs & ~kept, axis=both),
        "pairs_clamped": jnp.sum(jnp.where(kept, clamped, 0), axis=both),
        "prefixes_with_pairs": jnp.sum(first & paired & (branches.prefixes >= 0), axis=-1),
        "has_pairs": jnp.any(kept, axis=both),
    }
