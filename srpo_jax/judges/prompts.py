"""Prompts of judges that are models.

A template (see `srpo_jax.prompts`) sees `question`, `answer`, `steps` (see `paths.Step`) and, where a judge asks step by step,
`step` and `number`. One that compares sees `question`, `aspect`, `first` and `second` (see `verdict.AnswerPair`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from srpo_jax.judges.verdict import AnswerPair
from srpo_jax.paths import ParsedPath
from srpo_jax.prompts import Prompt, PromptFile

FOLDER = Path(__file__).parent / "templates"


class Template:
    """A template file.

    Attributes:
      name: the file's stem and a digest of its content, so that a changed template is another judge.

    Raises:
      ValueError: see `PromptFile`.
    """

    def __init__(self, path: str | Path):
        """Reads `path`; a bare name is one of the package's templates."""
        self._file = PromptFile(path, FOLDER)
        self.name = f"{self._file.stem}@{self._file.sha256[:8]}"

    def render(self, record: Any, material: ParsedPath | AnswerPair, number: int | None = None) -> Prompt:
        """The prompt about an answer, about two of them or, with `number` from 1, about that step.

        Raises:
          ValueError: a template that asks for something that is not there; names it.
        """
        known: dict[str, Any] = {"question": record.question}
        if isinstance(material, AnswerPair):
            return self._file.render(known | dataclasses.asdict(material))
        known |= {"answer": material.answer, "steps": material.steps}
        if number is not None:
            known |= {"number": number, "step": material.steps[number - 1]}
        return self._file.render(known)
