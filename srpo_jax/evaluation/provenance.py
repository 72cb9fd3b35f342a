"""What a number came from, beside what an entry of `results.json` says of decoding, benchmark and evaluator."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from srpo_jax.evaluation.generate import Prompt
from srpo_jax.models.fingerprint import params_fingerprint

PACKAGES = ("srpo_jax", "jax", "jaxlib", "flax", "numpy", "transformers")


def provenance(
    params: Mapping[str, Any], prompts: Sequence[Prompt], training_judge: str | None = None
) -> dict[str, Any]:
    """Digests and versions as a JSON value.

    Args:
      params: what was evaluated; told as a checksum of all bits.
      prompts: as encoded; told as a digest of tokens and pixels, which the template and the image processor shape.
      training_judge: name of the judge that trained the policy, "" if none did, None if not known.
    """
    prints = sorted((prompt.record_id, prompt.fingerprint) for prompt in prompts)
    return {
        "params": params_fingerprint(params),
        "prompts": hashlib.sha256(repr(prints).encode()).hexdigest()[:16],
        "training_judge": training_judge,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "not installed"
