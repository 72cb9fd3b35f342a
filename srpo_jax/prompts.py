"""Prompts in files: Jinja templates with their digest, and foreign text fenced.

A template has the blocks `system` (may be missing) and `user`. Foreign text in it goes through the filter `fenced`: between
marks that its writer could not know, because they are a digest of all the material.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

VERSION = re.compile(r"\A\{#-?\s*version:\s*(\d+)\s*-?#\}")


class Prompt(NamedTuple):
    """A rendered prompt; `system` is "" where the template has none."""

    system: str
    user: str


class PromptFile:
    """A template file.

    Attributes:
      stem: the file's name without its ending.
      sha256: of its content, 64 hexadecimal digits.
      version: the number in a first line `{# version: 3 #}`; None without one.

    Raises:
      ValueError: no such file, no `user` block, or not valid Jinja; names the file.
    """

    def __init__(self, path: str | Path, folder: Path):
        """Reads `path`; a bare name is a template of `folder`."""
        file = folder / f"{path}.jinja" if "/" not in str(path) and "." not in str(path) else Path(path)
        if not file.is_file():
            known = ", ".join(sorted(known.stem for known in folder.glob("*.jinja")))
            raise ValueError(f"template {str(path)!r}: no such file; give a path, or one of {known}")
        text = file.read_text(encoding="utf-8")
        self.stem, self.sha256 = file.stem, hashlib.sha256(text.encode()).hexdigest()
        told = VERSION.match(text)
        self.version = int(told[1]) if told else None
        # Prompts are plain text for a model, so nothing is escaped for HTML; the fence keeps material apart.
        environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
        environment.filters["fenced"] = _fenced
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"{file}: not a Jinja template ({error})") from error
        if "user" not in self._template.blocks:
            raise ValueError(f"{file}: has no block 'user'; put what the model reads into {{% block user %}}")

    def render(self, material: Mapping[str, Any]) -> Prompt:
        """The prompt about `material`, whose values are text, or anything else that `str` tells apart.

        Raises:
          ValueError: a template that asks for something that is not there; names it.
        """
        digest = hashlib.sha256(json.dumps(material, sort_keys=True, default=str).encode()).hexdigest()
        context = self._template.new_context({**material, "mark": digest[:12]})
        try:
            texts = {name: "".join(block(context)).strip() for name, block in self._template.blocks.items()}
        except jinja2.TemplateError as error:
            raise ValueError(f"template {self.stem}@{self.sha256[:8]}: {error}") from error
        return Prompt(texts.get("system", ""), texts["user"])


@jinja2.pass_context
def _fenced(context: jinja2.runtime.Context, text: str) -> str:
    mark = context["mark"]
    return f"<<{mark}>>\n{text}\n<</{mark}>>"
