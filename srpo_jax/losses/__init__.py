"""Losses: pure functions of per-token log-probs. They know nothing of models."""

from srpo_jax.losses.srpo import BranchLogprobs, log_odds, reference_loss, sequence_mean, srpo

__all__ = ["BranchLogprobs", "log_odds", "reference_loss", "sequence_mean", "srpo"]
