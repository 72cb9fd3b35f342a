"""Group-relative policy gradients with the judge as reward; a group is the samples of one prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from srpo_jax.losses.branches import (
    BranchLogprobs,
    at_least,
    first_of_prefix,
    masked_mean,
    needed,
    one_of,
    same_prefix,
    token_mask,
)


def gated_reward(safe: jax.Array, effective: jax.Array) -> jax.Array:
    """Safety gated by effectiveness: 1 for a safe and effective answer, else 0, whatever one of the two alone says.

    The verdict of a branch is this reward where `favourable="safe_and_effective"`.

    Example:
      >>> import jax.numpy as jnp
      >>> gated_reward(jnp.array([1, 1, 0]), jnp.array([1, 0, 1])).tolist()
      [1.0, 0.0, 0.0]
    """
    return jnp.asarray(safe, jnp.float32) * jnp.asarray(effective, jnp.float32)


def group_advantages(
    rewards: jax.Array, counts: jax.Array, prefixes: jax.Array, *, scale: str = "std"
) -> tuple[jax.Array, jax.Array]:
    """How much better a branch is than its siblings: (r − mean of group) / (standard deviation of group + 1e-4).

    Args:
      rewards: float[B, M].
      counts: int[B, M], samples that each branch stands for; 0 takes no part.
      prefixes: int32[B, M].
      scale: "std" divides (unbiased, as trl does), "none" does not (Dr. GRPO, arXiv 2503.20783).

    Returns:
      float[B, M] advantages, 0 where `counts` is 0, and float[B, M] the number of samples in the branch's group.
    """
    one_of("scale", scale, ("std", "none"))
    group = same_prefix(prefixes) * counts[..., None, :]
    size = jnp.sum(group, axis=-1)
    mean = jnp.sum(group * rewards[..., None, :], axis=-1) / jnp.maximum(size, 1)
    deviation = rewards[..., None, :] - mean[..., :, None]
    variance = jnp.sum(group * deviation**2, axis=-1) / jnp.maximum(size - 1, 1)
    advantage = rewards - mean
    if scale == "std":
        advantage = advantage / (jnp.sqrt(variance) + 1e-4)
    return jnp.where(counts > 0, advantage, 0), size


def grpo(
    branches: BranchLogprobs,
    rewards: jax.Array | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    scale: str = "std",
    ratio: str = "token",
    aggregate: str = "sequence",
    max_tokens: int = 256,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Group relative policy optimization: −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A) + β KL_t.

    DeepSeekMath (arXiv 2402.03300), eq. 3 and 4, on the samples of every prefix; prefixes weigh the same. ρ_t is the
    ratio of the policy to the one that sampled, A as in `group_advantages`. Variants by option:

        Dr. GRPO (arXiv 2503.20783)  scale="none", aggregate="constant"
        DAPO (arXiv 2503.14476)      clip_high=0.28, aggregate="token"
        GSPO (arXiv 2507.18071)      ratio="sequence", clip_low=3e-4, clip_high=4e-4

    Args:
      branches: with `sampled` and `counts`; `verdicts` unless `rewards` are given; `reference` where `beta` is not 0.
      rewards: float[B, M]; default: 1 for favourable, 0 for unfavourable.
      clip_low: ε_low, 0 or more.
      clip_high: ε_high, 0 or more.
      beta: weight of the KL to the reference model (k3 estimate), 0 or more.
      scale: see `group_advantages`.
      ratio: "token", or "sequence" for the geometric mean of a branch's ratios.
      aggregate: "sequence" means over a branch's tokens, then over branches; "token" means over all tokens of a group;
        "constant" sums tokens over `max_tokens`, so that no answer gains by its length.
      max_tokens: see `aggregate`.

    Returns:
      float[B] losses and statistics: `grpo_clipped` (share of tokens outside the trust region), `grpo_informative`
      (share of groups whose rewards differ).

    Raises:
      ValueError: an option out of range, or an array that an option needs is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> branches = BranchLogprobs(
      ...     logprobs=jnp.array([[[-1.0], [-2.0]]]), lengths=jnp.array([[1, 1]]), prefixes=jnp.array([[0, 0]]),
      ...     pairs=jnp.zeros((1, 2, 2), bool), verdicts=jnp.array([[1, 0]]), sampled=jnp.array([[[-1.0], [-2.0]]]),
      ...     counts=jnp.array([[1, 1]]))
      >>> loss, _ = grpo(branches)
      >>> abs(float(loss[0])) < 1e-6  # on policy the value is 0; the gradient is not
      True
    """
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("beta", beta)):
        at_least(name, value)
    at_least("max_tokens", max_tokens, 1)
    one_of("ratio", ratio, ("token", "sequence"))
    one_of("aggregate", aggregate, ("sequence", "token", "constant"))
    counts, sampled = needed(branches, "counts", "grpo"), needed(branches, "sampled", "grpo")
    if rewards is None:
        rewards = needed(branches, "verdicts", "grpo")
    counts = jnp.where((branches.prefixes >= 0) & (branches.lengths > 0), counts, 0)
    advantage, size = group_advantages(rewards.astype(branches.logprobs.dtype), counts, branches.prefixes, scale=scale)
    mask = token_mask(branches) & (counts > 0)[..., None]
    log_rho = jnp.where(mask, branches.logprobs - jax.lax.stop_gradient(sampled), 0)
    if ratio == "sequence":
        log_rho = jnp.broadcast_to(masked_mean(log_rho, mask)[..., None], log_rho.shape)
    rho, gain = jnp.exp(log_rho), advantage[..., None]
    loss = -jnp.minimum(rho * gain, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * gain)
    if beta:
        gap = jax.lax.stop_gradient(needed(branches, "reference", "grpo with beta")) - branches.logprobs
        gap = jnp.where(mask, gap, 0)
        loss += beta * (jnp.exp(gap) - gap - 1)
    outside = jnp.where(gain > 0, rho > 1 + clip_high, rho < 1 - clip_low) & (gain != 0)
    aux = {
        "grpo_clipped": masked_mean(outside, mask, (-2, -1)),
        "grpo_informative": _mean_over_groups(advantage != 0, counts, branches.prefixes, how="any"),
    }
    per_branch = _per_branch(jnp.where(mask, loss, 0), mask, counts, branches.prefixes, size, aggregate, max_tokens)
    return _mean_over_groups(per_branch, counts, branches.prefixes, how="sum"), jax.lax.stop_gradient(aux)


def _per_branch(loss, mask, counts, prefixes, size, aggregate: str, max_tokens: int) -> jax.Array:
    """float[B, M]: each branch's share of its group's loss, such that the group's loss is their sum."""
    total = jnp.sum(loss, axis=-1) * counts
    if aggregate == "sequence":
        return total / jnp.maximum(jnp.sum(mask, axis=-1) * size, 1)
    if aggregate == "constant":
        return total / (max_tokens * jnp.maximum(size, 1))
    tokens = jnp.sum(mask, axis=-1) * counts
    in_group = jnp.sum(same_prefix(prefixes) * tokens[..., None, :], axis=-1)
    return total / jnp.maximum(in_group, 1)


def _mean_over_groups(x: jax.Array, counts: jax.Array, prefixes: jax.Array, *, how: str) -> jax.Array:
    """float[B]: mean over groups with samples of the sum (or "any") of `x` float[B, M] within the group."""
    same = same_prefix(prefixes) & (counts > 0)[..., None, :] & (counts > 0)[..., :, None]
    within = jnp.sum(same * x[..., None, :], axis=-1)
    if how == "any":
        within = within > 0
    return masked_mean(within, first_of_prefix(same) & (counts > 0))
