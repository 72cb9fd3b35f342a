"""Supervised objectives: on the reference path, on favourable branches, on sampled whole answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.losses.branches import BranchLogprobs, masked_mean, needed, sequence_mean


def reference_loss(path_logprobs: jax.Array, path_lengths: jax.Array) -> jax.Array:
    """L_ref: float[B], minus the mean log-prob of reference path and reply (float[B, A], int32[B])."""
    return -masked_mean(path_logprobs, jnp.arange(path_logprobs.shape[-1]) < path_lengths[..., None])


def sft(path_logprobs: jax.Array, path_lengths: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Supervised fine-tuning on reference path and reply: L = −1/r Σ_t log π(τ_t).

    Args:
      path_logprobs: float[B, A], log π of the tokens of reference path and reply.
      path_lengths: int32[B], how many of them are real.

    Returns:
      float[B] losses and the statistic `reference_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sft(jnp.array([[-1.0, -3.0, jnp.nan]]), jnp.array([2]))[0][0])
      2.0
    """
    loss = reference_loss(path_logprobs, path_lengths)
    return loss, {"reference_loss": jax.lax.stop_gradient(loss)}


def favourable_sft(
    path_logprobs: jax.Array, path_lengths: jax.Array, branches: BranchLogprobs
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SFT on the reference path and on the favourable branches: L = L_ref − mean over favourable b of m(b).

    What exploration adds without any contrast. A branch's prefix is part of the reference and is learned there.

    Args:
      path_logprobs: float[B, A].
      path_lengths: int32[B].
      branches: the explored branches, with `verdicts`.

    Returns:
      float[B] losses and statistics; a question without favourable branches has L_ref alone.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-0.5], [-9.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.zeros((1, 2, 2), bool), verdicts=jnp.array([[1, 0]]))
      >>> float(favourable_sft(jnp.array([[-2.0]]), jnp.array([1]), branches)[0][0])
      2.5
    """
    anchor = reference_loss(path_logprobs, path_lengths)
    chosen = needed(branches, "verdicts", "favourable_sft") == 1
    learned = -masked_mean(sequence_mean(branches), chosen)
    aux = {"reference_loss": anchor, "branch_loss": learned, "branches_learned": jnp.sum(chosen, axis=-1)}
    return anchor + learned, jax.lax.stop_gradient(aux)


def rejection_sft(branches: BranchLogprobs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rejection-sampling SFT: L = −mean over favourable b at prefix 0 of m(b).

    The policy learns its own accepted answers, sampled from the prompt alone, and no reference (STaR, arXiv 2203.14465;
    RFT, arXiv 2308.01825; identical samples count once, as in RFT). A question whose samples were all rejected teaches
    nothing.

    Args:
      branches: the explored branches, with `verdicts`.

    Returns:
      float[B] losses and statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-0.5], [-9.0], [-4.0]]]), lengths=jnp.array([[1, 1, 1]]),
      ...     prefixes=jnp.array([[0, 0, 1]]), pairs=jnp.zeros((1, 3, 3), bool), verdicts=jnp.array([[1, 0, 1]]))
      >>> float(rejection_sft(branches)[0][0])
      0.5
    """
    chosen = (needed(branches, "verdicts", "rejection_sft") == 1) & (branches.prefixes == 0)
    loss = -masked_mean(sequence_mean(branches), chosen)
    return loss, jax.lax.stop_gradient({"rejection_loss": loss, "samples_accepted": jnp.sum(chosen, axis=-1)})
