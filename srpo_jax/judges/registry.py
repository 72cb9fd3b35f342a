"""Judges by name, as flags and configurations give them."""

from __future__ import annotations

import importlib
from pathlib import Path

from srpo_jax.exploration.judging import Judge
from srpo_jax.judges import rules


class JudgeError(ValueError):
    """A judge that cannot be made from its name."""


def make_judge(spec: str, folder: str | Path | None = None) -> Judge:
    """The judge that `spec` names.

    Args:
      spec: "rules" (the embedded world's);
        "endpoint:MODEL@URL", or "endpoint:FILE.json" for every setting (see `judges.endpoint.EndpointConfig`);
        "guard:FOLDER", or "guard:FILE.json" (see `judges.guard.GuardConfig`);
        "package.module:function", a judge of yours.
      folder: where a judge that costs money keeps its raw answers.

    Raises:
      JudgeError: there is no such judge, or it is no function.
    """
    if spec == "rules":
        return rules.judge
    kind, _, rest = spec.partition(":")
    if kind == "endpoint":
        return _endpoint(spec, rest, folder)
    if kind == "guard":
        # Rules and endpoints need no model of ours, and are there at once without one.
        from srpo_jax.judges.guard import GuardConfig, guard_judge

        try:
            return guard_judge(GuardConfig.read(rest) if rest.endswith(".json") else GuardConfig(rest))
        except (OSError, ValueError) as error:
            raise JudgeError(f"{spec!r}: {error}") from error
    module, _, name = spec.partition(":")
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise JudgeError(
            f"{spec!r} is no 'package.module:function' ({error}); modules are looked for among installed packages and in "
            "PYTHONPATH"
        ) from error
    if not callable(judge):
        raise JudgeError(f"{spec!r} is a {type(judge).__name__}, not a function")
    return judge


def _endpoint(spec: str, rest: str, folder: str | Path | None) -> Judge:
    try:
        from srpo_jax.endpoint import ClientConfig
        from srpo_jax.judges.endpoint import EndpointConfig, endpoint_judge
    except ImportError as error:
        raise JudgeError(f"{spec!r} needs the client library: pip install 'srpo_jax[judge]' ({error})") from error
    model, _, url = rest.partition("@")
    try:
        config = EndpointConfig.read(rest) if rest.endswith(".json") else EndpointConfig(ClientConfig(model, url))
        return endpoint_judge(config, folder)
    except ValueError as error:
        raise JudgeError(f"{spec!r}: {error}") from error
