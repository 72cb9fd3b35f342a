"""Building a data set of SSUI records from pictures of one's own (docs/data.md)."""

from srpo_jax.data.builder.agents import Agent, Ask, read_agents
from srpo_jax.data.builder.build import BuildConfig, Built, build, render
from srpo_jax.data.builder.intake import IntakeConfig, read_manifest

__all__ = ["Agent", "Ask", "BuildConfig", "Built", "IntakeConfig", "build", "read_agents", "read_manifest", "render"]
