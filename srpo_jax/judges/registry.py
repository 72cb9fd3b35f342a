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
      spec: "rules" (the embedded world's), or "package.module:function", a judge of yours.
      folder: where a judge that costs money keeps its raw answers.

    Raises:
      JudgeError: there is no such judge, or it is no function.
    """
    if spec == "rules":
        return rules.judge
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
