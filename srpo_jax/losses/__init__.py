"""Losses: pure functions of per-token log-probs. They know nothing of models."""

from srpo_jax.losses.branches import BranchLogprobs, log_odds, pair_statistics, sequence_mean
from srpo_jax.losses.policy_gradient import gated_reward, group_advantages, grpo
from srpo_jax.losses.preference import dpo, ipo, kto, orpo, simpo, step_dpo
from srpo_jax.losses.safekey import key_sentence_loss, safety_head_loss
from srpo_jax.losses.srpo import rpo, srpo
from srpo_jax.losses.supervised import favourable_sft, reference_loss, rejection_sft, sft

__all__ = [
    "BranchLogprobs",
    "dpo",
    "favourable_sft",
    "gated_reward",
    "group_advantages",
    "grpo",
    "ipo",
    "key_sentence_loss",
    "kto",
    "log_odds",
    "orpo",
    "pair_statistics",
    "reference_loss",
    "rejection_sft",
    "rpo",
    "safety_head_loss",
    "sequence_mean",
    "sft",
    "simpo",
    "srpo",
    "step_dpo",
]
