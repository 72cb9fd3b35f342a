"""The SRPO objective (after Cai et al., AAAI-26, arXiv 2509.12060) on per-token log-probs.

The paper names two terms: learn the reference path, and prefer favourable over unfavourable explored branches. It does
not publish their equations; the ones below follow its parent RPO (arXiv 2410.10858), whose code is public. With `b` a
branch of `n` tokens at prefix `i`, and `P_i` the favourable × unfavourable pairs there:

    m(b)       = 1/n Σ_t log π(b_t | prefix i, b_<t)
    logodds(m) = m − log(1 − e^m)
    ℓ(b⁺, b⁻)  = −log σ(logodds(m(b⁺)) − logodds(m(b⁻)))
    L_exp      = mean over prefixes that have a pair of (mean over P_i of ℓ)
    L_ref      = −mean over the tokens of reference path and reply of log π
    L          = mean over questions of L_ref + λ L_exp

Shapes: `B` questions, `A` path tokens, `M` branches, `L` tokens of a branch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.losses.branches import (
    BranchLogprobs,
    at_least,
    log_odds,
    one_of,
    pair_means,
    pair_statistics,
    pair_weights,
    sequence_mean,
)
from srpo_jax.losses.supervised import reference_loss


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
    prefix_lengths: jax.Array | None = None,
    *,
    lambda_: float = 0.3,
    reference: str = "path",
    mask_shared_opening: bool = False,
    balance: str = "prefix",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SRPO loss of every question: L_ref + λ L_exp (see the module).

    Args:
      path_logprobs: float[B, A], log π of the tokens of reference path and reply.
      path_lengths: int32[B], how many of them are real.
      branches: the explored branches.
      prefix_lengths: int32[B, M]; needed by `reference="favourable"`.
      lambda_: weight of the contrastive term, 0 or more.
      reference: "path" for the trunk's own path and reply, "favourable" for RPO's prefix + favourable branch.
      mask_shared_opening: leave the tokens that a pair shares at its start out of m (RPO's released code).
      balance: how pairs are weighed within a question, see `pair_weights`.

    Returns:
      float[B] losses, to be averaged over questions, and statistics float[B] named as in `docs/loss.md`.

    Raises:
      ValueError: an option out of range, or an array that an option needs is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.log(jnp.array([[[0.6], [0.2]]])), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]))
      >>> loss, _ = srpo(jnp.log(jnp.array([[0.5]])), jnp.array([1]), branches, lambda_=1.0)
      >>> round(float(loss[0] - jnp.log(2.0)), 4)  # log(1 + odds ratio⁻¹), odds 1.5 against 0.25
      0.1542
    """
    at_least("lambda_", lambda_)
    one_of("reference", reference, ("path", "favourable"))
    plus, minus, kept = pair_means(branches, mask_shared_opening=mask_shared_opening)
    weights = pair_weights(kept, branches.prefixes, balance)
    losses = -jax.nn.log_sigmoid(log_odds(jnp.where(kept, plus, -1.0)) - log_odds(jnp.where(kept, minus, -1.0)))
    contrastive = jnp.sum(weights * losses, axis=(-2, -1))
    if reference == "path":
        anchor = reference_loss(path_logprobs, path_lengths)
    elif prefix_lengths is None:
        raise ValueError("reference='favourable' needs prefix_lengths")
    else:
        anchor = favourable_reference_loss(path_logprobs, prefix_lengths, branches, weights)
    statistics = pair_statistics(branches, means=(plus, minus, kept))
    aux = {"reference_loss": anchor, "contrastive_loss": contrastive, **statistics}
    return anchor + lambda_ * contrastive, jax.lax.stop_gradient(aux)


def rpo(
    path_logprobs: jax.Array,
    path_lengths: jax.Array,
    branches: BranchLogprobs,
    prefix_lengths: jax.Array,
    *,
    beta: float = 0.3,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reasoning Path Optimization as its code was released (arXiv 2410.10858): the parent of SRPO.

    For each pair, L_ref = −mean log π over prefix and favourable branch together, L_exp = −log σ of the difference of
    log-odds, where the tokens that the two branches share at their start do not count; L = mean over pairs of L_ref + β
    L_exp. It learns nothing from a question without pairs.

    Args:
      path_logprobs: float[B, A], log π of the tokens of reference path and reply.
      path_lengths: int32[B], how many of them are real.
      branches: the explored branches, with `tokens`.
      prefix_lengths: int32[B, M], path tokens of each branch's prefix.
      beta: weight of the contrastive term (the released default is 0.1, its example 0.3).

    Returns:
      As `srpo`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.log(jnp.array([[[0.6], [0.2]]])), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]), tokens=jnp.array([[[7], [8]]]))
      >>> loss, _ = rpo(jnp.log(jnp.array([[0.5]])), jnp.array([1]), branches, jnp.array([[0, 0]]), beta=1.0)
      >>> round(float(loss[0] + jnp.log(0.6)), 4)  # the path is no part of it
      0.1542
    """
    released = {"reference": "favourable", "mask_shared_opening": True, "balance": "pair"}
    return srpo(path_logprobs, path_lengths, branches, prefix_lengths, lambda_=beta, **released)  # type: ignore[arg-type]
