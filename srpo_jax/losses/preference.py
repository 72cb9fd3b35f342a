"""Preferences between branches of one prefix: DPO, IPO, step-DPO, ORPO and SimPO on pairs, KTO on single branches.

The prompt of a pair is the prompt and the shared prefix of the path; the two answers are the branches. All pairs of a
question come from the same per-token log-probs. `balance` weighs the pairs of a question as in `srpo`, so that these
differ from it in the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from srpo_jax.losses.branches import (
    BranchLogprobs,
    at_least,
    log_odds,
    log_ratio,
    masked_mean,
    needed,
    pair_weights,
    sequence_mean,
)

Told = tuple[jax.Array, dict[str, jax.Array]]


def over_pairs(
    branches: BranchLogprobs, score: jax.Array, loss: Callable[[jax.Array], jax.Array], balance: str
) -> tuple[jax.Array, jax.Array]:
    """Weighted means over a question's pairs: of `loss(score(b+) − score(b−))` and of that margin, float[B] each."""
    margin = score[..., :, None] - score[..., None, :]
    weights = pair_weights(branches.pairs, branches.prefixes, balance)
    total = jnp.sum(weights * loss(margin), axis=(-2, -1))
    return total, jax.lax.stop_gradient(jnp.sum(weights * margin, axis=(-2, -1)))


def dpo(branches: BranchLogprobs, *, beta: float = 0.1, normalise: bool = False, balance: str = "prefix") -> Told:
    """Direct preference optimization: −log σ(β (h(b⁺) − h(b⁻))), h(b) = log π(b) − log π_ref(b).

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    Args:
      branches: with `reference`.
      beta: strength of the bond to the reference model, more than 0.
      normalise: h per token instead of their sum (as Tulu 3, arXiv 2411.15124, section 5).
      balance: see `branches.pair_weights`.

    Returns:
      float[B] losses, 0 for a question without pairs, and the statistic `margin_dpo`, mean of h(b⁺) − h(b⁻).

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0], [-2.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]), reference=jnp.array([[[-1.0], [-2.0]]]))
      >>> round(float(dpo(branches)[0][0]), 4)  # ln 2 where policy and reference coincide
      0.6931
    """
    at_least("beta", beta, strict=True)
    score = log_ratio(branches, "dpo", normalise=normalise)
    loss, margin = over_pairs(branches, score, lambda x: -jax.nn.log_sigmoid(beta * x), balance)
    return loss, {"margin_dpo": margin}


def ipo(branches: BranchLogprobs, *, tau: float = 0.1, normalise: bool = True, balance: str = "prefix") -> Told:
    """Identity preference optimization: (h(b⁺) − h(b⁻) − 1/(2τ))².

    Azar et al. 2023 (arXiv 2310.12036), eq. 17; h as in `dpo`, by default per token.

    Args:
      branches: with `reference`.
      tau: regularisation, more than 0; the loss is least at a margin of 1/(2τ).
      normalise: h per token, or their sum.
      balance: see `branches.pair_weights`.

    Returns:
      float[B] losses, 0 for a question without pairs, and the statistic `margin_ipo`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0], [-2.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]), reference=jnp.array([[[-3.0], [-2.0]]]))
      >>> float(ipo(branches, tau=0.25)[0][0])  # margin 2 = 1/(2τ)
      0.0
    """
    at_least("tau", tau, strict=True)
    score = log_ratio(branches, "ipo", normalise=normalise)
    loss, margin = over_pairs(branches, score, lambda x: (x - 1 / (2 * tau)) ** 2, balance)
    return loss, {"margin_ipo": margin}


def step_dpo(branches: BranchLogprobs, *, beta: float = 0.1, balance: str = "prefix") -> Told:
    """DPO on sibling steps: the loss of `dpo` over the first own step of each branch.

    Preferences between siblings of a search tree as in STAIR (arXiv 2502.02384), whose step values are means over
    roll-outs; here a step's value is the verdict of the one continuation that begins with it, and what follows the step
    counts nothing.

    Args:
      branches: with `reference` and `step_lengths`.
      beta: as in `dpo`.
      balance: see `branches.pair_weights`.

    Returns:
      float[B] losses, 0 for a question without pairs, and the statistic `margin_step_dpo`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0, -5.0], [-2.0, -0.1]]]), lengths=jnp.array([[2, 2]]),
      ...     prefixes=jnp.array([[0, 0]]), pairs=jnp.array([[[False, True], [False, False]]]),
      ...     reference=jnp.array([[[-1.0, -1.0], [-2.0, -1.0]]]), step_lengths=jnp.array([[1, 1]]))
      >>> round(float(step_dpo(branches)[0][0]), 4)  # the first tokens alone
      0.6931
    """
    step_lengths = needed(branches, "step_lengths", "step_dpo")
    loss, told = dpo(branches._replace(lengths=step_lengths), beta=beta, balance=balance)
    return loss, {"margin_step_dpo": told["margin_dpo"]}


def orpo(branches: BranchLogprobs, *, lambda_: float = 0.1, balance: str = "prefix") -> Told:
    """Odds ratio preference optimization: −m(b⁺) − λ log σ(logodds(m(b⁺)) − logodds(m(b⁻))).

    Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7. The contrast is SRPO's; the anchor is the favourable branch
    instead of the reference path.

    Args:
      branches: the explored branches.
      lambda_: weight of the odds-ratio term, 0 or more.
      balance: see `branches.pair_weights`.

    Returns:
      float[B] losses, 0 for a question without pairs, and statistics `margin_orpo` (log odds ratio) and
      `orpo_odds_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.log(jnp.array([[[0.5], [0.5]]])), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]))
      >>> round(float(orpo(branches, lambda_=1.0)[0][0]), 4)  # ln 2 + ln 2
      1.3863
    """
    at_least("lambda_", lambda_)
    m = sequence_mean(branches)
    odds, margin = over_pairs(branches, log_odds(m), lambda x: -jax.nn.log_sigmoid(x), balance)
    weights = pair_weights(branches.pairs, branches.prefixes, balance)
    anchor = -jnp.sum(jnp.sum(weights, axis=-1) * m, axis=-1)
    return anchor + lambda_ * odds, {"margin_orpo": margin, "orpo_odds_loss": jax.lax.stop_gradient(odds)}


def simpo(branches: BranchLogprobs, *, beta: float = 2.0, gamma: float = 1.0, balance: str = "prefix") -> Told:
    """Simple preference optimization: −log σ(β (m(b⁺) − m(b⁻)) − γ).

    Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    Args:
      branches: the explored branches.
      beta: scale of the length-normalised reward, more than 0.
      gamma: target margin, 0 or more.
      balance: see `branches.pair_weights`.

    Returns:
      float[B] losses, 0 for a question without pairs, and the statistic `margin_simpo`, mean of m(b⁺) − m(b⁻).

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0], [-2.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.array([[[False, True], [False, False]]]))
      >>> round(float(simpo(branches, beta=1.0, gamma=1.0)[0][0]), 4)
      0.6931
    """
    at_least("beta", beta, strict=True)
    at_least("gamma", gamma)
    score = sequence_mean(branches)
    loss, margin = over_pairs(branches, score, lambda x: -jax.nn.log_sigmoid(beta * x - gamma), balance)
    return loss, {"margin_simpo": margin}


def kto(
    branches: BranchLogprobs,
    kl: jax.Array | None = None,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Told:
    """Kahneman-Tversky optimization: λ_D (1 − σ(β (h − z))) for favourable, λ_U (1 − σ(β (z − h))) for unfavourable b.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8; h as in `dpo`. It needs no pairs. `z` estimates KL(π ‖
    π_ref): the paper scores mismatched answers for it; branches are samples of the policy itself, so by default `z` is
    the mean of h over the question's branches, cut at 0.

    Args:
      branches: with `reference` and `verdicts`.
      kl: float[B], another estimate of z.
      beta: as in `dpo`.
      desirable: λ_D, 0 or more.
      undesirable: λ_U, 0 or more.

    Returns:
      float[B] losses, the mean over branches with a verdict, and the statistic `kl_kto`.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0], [-2.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 1]]),
      ...     pairs=jnp.zeros((1, 2, 2), bool), verdicts=jnp.array([[1, 0]]), reference=jnp.array([[[-1.0], [-2.0]]]))
      >>> float(kto(branches)[0][0])
      0.5
    """
    at_least("beta", beta, strict=True)
    at_least("desirable", desirable)
    at_least("undesirable", undesirable)
    verdicts = needed(branches, "verdicts", "kto")
    ratio, known = log_ratio(branches, "kto"), verdicts >= 0
    if kl is None:
        kl = jnp.maximum(masked_mean(ratio, known), 0)
    gap = beta * (ratio - jax.lax.stop_gradient(kl)[..., None])
    loss = jnp.where(verdicts == 1, desirable * jax.nn.sigmoid(-gap), undesirable * jax.nn.sigmoid(gap))
    return masked_mean(loss, known), {"kl_kto": jax.lax.stop_gradient(kl)}
