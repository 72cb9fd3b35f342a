"""Prompts of judges that are models: templates in files, material fenced.

A template is a Jinja file with the blocks `system` (may be missing) and `user`. It sees `question`, `answer`, `steps` (see
`paths.Step`) and, where a judge asks step by step, `step` and `number`. Material goes through the filter `fenced`: between
marks that its writer could not know, because they are a digest of the material itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from srpo_jax.paths import ParsedPath

FOLDER = Path(__file__).parent / "templates"


class Prompt(NamedTuple):
    """A rendered prompt; `system` is "" where the template has none."""

    system: str
    user: str


class Template:
    """A template file.

    Attributes:
      name: the file's stem and a digest of its content, so that a changed template is another judge.

    Raises:
      ValueError: no such file, no `user` block, or not valid Jinja; names the file.
    """

    def __init__(self, path: str | Path):
        """Reads `path`; a bare name is one of the package's templates."""
        file = FOLDER / f"{path}.jinja" if "/" not in str(path) and "." not in str(path) else Path(path)
        if not file.is_file():
            known = ", ".join(sorted(known.stem for known in FOLDER.glob("*.jinja")))
            raise ValueError(f"template {str(path)!r}: no such file; give a path, or one of {known}")
        text = file.read_text(encoding="utf-8")
        self.name = f"{file.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        # Prompts are plain text for a model, so nothing is escaped for HTML; the fence keeps material apart.
        environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
        environment.filters["fenced"] = _fenced
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"{file}: not a Jinja template ({error})") from error
        if "user" not in self._template.blocks:
            raise ValueError(f"{file}: has no block 'user'; put what the judge reads into {{% block user %}}")

    def render(self, record: Any, path: ParsedPath, number: int | None = None) -> Prompt:
        """The prompt about an answer or, with `number` from 1, about that step.

        Raises:
          ValueError: a template that asks for something that is not there; names it.
        """
        known: dict[str, Any] = {"question": record.question, "answer": path.answer, "steps": path.steps}
        if number is not None:
            known |= {"number": number, "step": path.steps[number - 1]}
        material = "\x00".join([record.question, path.answer or "", *(step.text for step in path.steps)])
        context = self._template.new_context(known | {"mark": hashlib.sha256(material.encode()).hexdigest()[:12]})
        try:
            texts = {name: "".join(block(context)).strip() for name, block in self._template.blocks.items()}
        except jinja2.TemplateError as error:
            raise ValueError(f"template {self.name}: {error}") from error
        return Prompt(texts.get("system", ""), texts["user"])


@jinja2.pass_context
def _fenced(context: jinja2.runtime.Context, text: str) -> str:
    mark = context["mark"]
    return f"<<{mark}>>\n{text}\n<</{mark}>>"
