"""Safety-aware Reasoning Path Optimization for multimodal models, in JAX.

    import srpo_jax as sx

    policy = sx.load_policy("path/to/hf_or_run")
    trees = sx.explore(policy, policy.params, records, sx.ExploreConfig(k=4), judge, jax.random.key(0))
    loss, aux = sx.srpo_loss(policy, policy.params, sx.pack(trees, policy), lambda_=0.3)

Names are resolved when first used, so that importing one module does not load them all.
"""

import importlib
from typing import Any

_FACE = {
    "ExploreConfig": "srpo_jax.exploration.explorer",
    "Grammar": "srpo_jax.paths",
    "LoraConfig": "srpo_jax.models.lora",
    "PackConfig": "srpo_jax.trees",
    "Policy": "srpo_jax.models.policy",
    "ReasoningTree": "srpo_jax.trees",
    "Record": "srpo_jax.data.records",
    "TreeBatch": "srpo_jax.trees",
    "adapt": "srpo_jax.models.policy",
    "evaluate": "srpo_jax.evaluation.evaluate",
    "explore": "srpo_jax.exploration.explorer",
    "forward": "srpo_jax.models.policy",
    "load_policy": "srpo_jax.api",
    "pack": "srpo_jax.api",
    "score": "srpo_jax.api",
    "srpo_loss": "srpo_jax.api",
}
_MODULES = ("losses", "paths", "trees")

__all__ = [*_FACE, *_MODULES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"srpo_jax.{name}")
    raise AttributeError(f"module 'srpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
