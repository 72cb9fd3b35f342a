"""The SRPO objective (after Cai et al., AAAI-26, arXiv 2509.12060) on per-token log-probs.

The paper names two terms: learn the reference path, and prefer favourable over unfavourable explored branches. It does not
publish their equations; the ones below follow its parent RPO (arXiv 2410.10858), whose code is public. With `b` a branch of
`n` tokens at prefix `i`, and `P_i` the favourable × unfavourable pairs there:

    m(b)       = 1/n Σ_t log π(b_t | prefix i, b_<t)
    logodds(m) = m − log(1 − e^m)
    ℓ(b⁺, b⁻)  = −log σ(logodds(m(b⁺)) − logodds(m(b⁻)))
    L_exp      = mean over prefixes that have a pair of (mean over P_i of ℓ)
    L_ref      = −mean over the tokens of reference path and reply of log π
    L          = mean over questions of L_ref + λ L_exp

Shapes: `B` questions, `A` path tokens, `M` branches, `L` tokens of a branch.
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
      tokens: int32[B, M, L], the tokens themselves; needed by `mask_shared_opening` only.
    """

    logprobs: jax.Array
    lengths: jax.Array
    prefixes: jax.Array
    pairs: jax.Array
    tokens: jax.Array | None = None


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Mean of `x` where `mask`, 0 where nothing is; what is masked out does not reach the gradient."""
    count = jnp.sum(mask, axis=axis)
    return jnp.sum(jnp.where(mask, x, 0), axis=axis) / jnp.maximum(count, 1)


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
    valid = jnp.arange(branches.logprobs.shape[-1]) < branches.lengths[..., None]
    return masked_mean(branches.logprobs, valid)


def shared_opening(branches: BranchLogprobs) -> jax.Array:
    """int32[B, M, M]: how many leading tokens each two branches have in common."""
    tokens, lengths = branches.tokens, branches.lengths
    if tokens is None:
        raise ValueError("mask_shared_opening compares tokens: give BranchLogprobs.tokens")
    both = jnp.minimum(lengths[..., :, None], lengths[..., None, :])
    equal = tokens[..., :, None, :] == tokens[..., None, :, :]
    equal &= jnp.arange(tokens.shape[-1]) < both[..., None]
    return jnp.sum(jnp.cumprod(equal.astype(jnp.int32), axis=-1), axis=-1)


def pair_means(branches: BranchLogprobs, *, mask_shared_opening: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m of both sides of every pair, and which pairs remain.

    With `mask_shared_opening` the tokens that the two share at their start do not count (RPO's released code); a pair of
    which one side is the other's opening has nothing left to compare and is dropped.

    Returns:
      m(b+) and m(b-) as float[B, M, M] (broadcast if nothing is masked), and bool[B, M, M].
    """
    if not mask_shared_opening:
        m = sequence_mean(branches)
        shape = branches.pairs.shape
        return jnp.broadcast_to(m[..., :, None], shape), jnp.broadcast_to(m[..., None, :], shape), branches.pairs
    valid = jnp.arange(branches.logprobs.shape[-1]) < branches.lengths[..., None]
    sums = jnp.cumsum(jnp.where(valid, branches.logprobs, 0), axis=-1)
    sums = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], axis=-1)
    shared = shared_opening(branches)
    lengths = branches.lengths[..., :, None]
    rest = lengths - shared
    opening = jnp.take_along_axis(sums, shared, axis=-1)
    m = (sums[..., -1:] - opening) / jnp.maximum(rest, 1)
    kept = branches.pairs & (rest > 0) & (jnp.swapaxes(rest, -1, -2) > 0)
    return m, jnp.swapaxes(m, -1, -2), kept


def pair_weights(pairs: jax.Array, prefixes: jax.Array, balance: str = "prefix") -> jax.Array:
    """float[B, M, M] weights of the pairs, summing to 1 per question that has one.

    `balance="prefix"`: prefixes with a pair weigh the same, and so do the pairs of a prefix. `balance="pair"`: all pairs of a
    question weigh the same (RPO's released code).
    """
    per_branch = jnp.sum(pairs, axis=-1)
    if balance == "pair":
        return pairs / jnp.maximum(jnp.sum(per_branch, axis=-1), 1)[..., None, None]
    if balance != "prefix":
        raise ValueError(f"balance={balance!r}: use 'prefix' or 'pair'")
    same = prefixes[..., :, None] == prefixes[..., None, :]
    per_prefix = jnp.sum(jnp.where(same, per_branch[..., None, :], 0), axis=-1)  # |P_i| of each branch's prefix
    first = first_of_prefix(same)
    count = jnp.sum(first & (per_prefix > 0) & (prefixes >= 0), axis=-1)
    return pairs / jnp.maximum(per_prefix * count[..., None], 1)[..., None]


def first_of_prefix(same: jax.Array) -> jax.Array:
    """bool[B, M]: the first branch of each prefix, given which branches share one (bool[B, M, M])."""
    earlier = jnp.tri(same.shape[-1], k=-1, dtype=bool)
    return ~jnp.any(same & earlier, axis=-1)


def reference_loss(path_logprobs: jax.Array, path_lengths: jax.Array) -> jax.Array:
    """L_ref: float[B], minus the mean log-prob of reference path and reply (float[B, A], int32[B])."""
    return -masked_mean(path_logprobs, jnp.arange(path_logprobs.shape[-1]) < path_lengths[..., None])


def favourable_reference_loss(
    path_logprobs: jax.Array, prefix_lengths: jax.Array, branches: BranchLogprobs, weights: jax.Array
) -> jax.Array:
    """RPO's reference term: float[B], minus the mean log-prob of prefix and favourable branch together, over pairs.

    Args:
      path_logprobs: float[B, A].
      prefix_lengths: int32[B, M], path tokens of each branch's prefix.
      branches: the branches.
      weights: float[B, M, M] from `pair_weights`.
    """
    in_prefix = jnp.arange(path_logprobs.shape[-1]) < prefix_lengths[..., None]
    prefix_sum = jnp.sum(jnp.where(in_prefix, path_logprobs[..., None, :], 0), axis=-1)
    total = prefix_sum + sequence_mean(branches) * branches.lengths
    mean = total / jnp.maximum(prefix_lengths + branches.lengths, 1)
    return -jnp.sum(mean * jnp.sum(weights, axis=-1), axis=-1)


def srpo(
    path_logprobs: jax.Array,
    path_lengths: jax.Array,
    branches: BranchLogprobs,
    *,
    lambda_: float = 0.3,
    reference: str = "path",
    prefix_lengths: jax.Array | None = None,
    mask_shared_opening: bool = False,
    balance: str = "prefix",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SRPO loss of every question.

    Args:
      path_logprobs: float[B, A], log π of the tokens of reference path and reply.
      path_lengths: int32[B], how many of them are real.
      branches: the explored branches.
      lambda_: weight of the contrastive term.
      reference: "path" for the trunk's own path and reply, "favourable" for RPO's prefix + favourable branch.
      prefix_lengths: int32[B, M]; needed by `reference="favourable"`.
      mask_shared_opening: leave the tokens that a pair shares at its start out of m (RPO's released code).
      balance: how pairs are weighed within a question, see `pair_weights`.

    Returns:
      float[B] losses, to be averaged over questions, and statistics float[B] named as in `docs/loss.md`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.log(jnp.array([[[0.6], [0.2]]])), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]))
      >>> loss, _ = srpo(jnp.log(jnp.array([[0.5]])), jnp.array([1]), branches, lambda_=1.0)
      >>> round(float(loss[0] - jnp.log(2.0)), 4)  # log(1 + odds ratio⁻¹), odds 1.5 against 0.25
      0.1542
    """
    plus, minus, kept = pair_means(branches, mask_shared_opening=mask_shared_opening)
    weights = pair_weights(kept, branches.prefixes, balance)
    losses = -jax.nn.log_sigmoid(log_odds(jnp.where(kept, plus, -1.0)) - log_odds(jnp.where(kept, minus, -1.0)))
    contrastive = jnp.sum(weights * losses, axis=(-2, -1))
    if reference == "path":
        anchor = reference_loss(path_logprobs, path_lengths)
    elif reference == "favourable":
        if prefix_lengths is None:
            raise ValueError("reference='favourable' needs prefix_lengths")
        anchor = favourable_reference_loss(path_logprobs, prefix_lengths, branches, weights)
    else:
        raise ValueError(f"reference={reference!r}: use 'path' or 'favourable'")
    aux = {"reference_loss": anchor, "contrastive_loss": contrastive, **_statistics(branches, plus, minus, kept)}
    return anchor + lambda_ * contrastive, jax.lax.stop_gradient(aux)


def _statistics(branches: BranchLogprobs, plus: jax.Array, minus: jax.Array, kept: jax.Array) -> dict[str, jax.Array]:
    """What explains a run. Odds reward predictable filler as m nears 0: watch lengths, slopes and the clamped count."""
    both = (-2, -1)
    lengths = jnp.broadcast_to(branches.lengths[..., :, None], kept.shape)
    same = branches.prefixes[..., :, None] == branches.prefixes[..., None, :]
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
