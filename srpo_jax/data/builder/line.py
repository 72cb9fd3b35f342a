"""The line that candidates pass: one stage for all of them, then the next; what is known is never asked again.

An outcome is kept under a digest of all it depends on (stage, template, agent, prompt, picture, guards): another template
or agent asks again, a killed run goes on. Log and outcomes lie in `work/`, readable to their owner only:

    outcomes.jsonl   what came of each question, with its tokens and cost
    log.jsonl        every try: prompt, answer, model, tokens, cost; personal data and keys redacted

What a guard or moderator refuses stands in neither, only that it was refused, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.builder import guards
from srpo_jax.data.builder.agents import Agent, Ask
from srpo_jax.data.builder.intake import Picture, SetAside
from srpo_jax.data.builder.stages import Excluded, Stage, Unusable, parse
from srpo_jax.data.privacy import redact
from srpo_jax.endpoint import ANSWERS, Reply, ReplyStatus
from srpo_jax.files import Store
from srpo_jax.prompts import PromptFile

TEMPLATES = Path(__file__).parent / "templates"
ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


class Refused(Exception):
    """A guard or moderator refuses a reply; the message is the rule, never the text."""


@dataclasses.dataclass
class Candidate:
    """What is on the line.

    Attributes:
      id: of the record it may become; of its picture before it has a question.
      picture: it is about.
      values: what the stages have found: question, category, steps, ...
      trail: one entry per stage passed, for the record's provenance.
      marks: what of it is this library's own.
    """

    id: str
    picture: Picture
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    trail: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    marks: list[str] = dataclasses.field(default_factory=list)

    def child(self, id: str, values: Mapping[str, Any]) -> Candidate:
        """A candidate that goes on from here with values of its own."""
        return Candidate(id, self.picture, dict(values), [*self.trail], [*self.marks])


@dataclasses.dataclass
class Spent:
    """What was spent; `cost` adds up what is known, `unpriced` counts replies without a known cost."""

    tries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0

    def add(self, reply: Reply, cost: float | None) -> None:
        """Adds a reply."""
        told = (1, reply.input_tokens or 0, reply.output_tokens or 0, cost or 0.0, int(cost is None))
        self.spend(Spent(*told))

    def spend(self, other: Spent) -> None:
        """Adds what was spent elsewhere."""
        for field in dataclasses.fields(Spent):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass
class _Question:
    """What is asked about a candidate: `first` is the text of the first try, `key` names the outcome."""

    candidate: Candidate
    ask: Ask
    key: str
    first: str
    spent: Spent = dataclasses.field(default_factory=Spent)


@dataclasses.dataclass
class Row(Spent):
    """A stage's line in the yield table: candidates in and out, why others were set aside, and what it took."""

    stage: str = ""
    entered: int = 0
    passed: int = 0
    aside: dict[str, int] = dataclasses.field(default_factory=dict)

    def lose(self, kind: str, count: int = 1) -> None:
        """Counts what was set aside."""
        self.aside[kind] = self.aside.get(kind, 0) + count


class Line:
    """Takes candidates through stages.

    Attributes:
      aside: what was set aside so far.
      rows: the yield table so far.
    """

    def __init__(self, output: Path, agents: Mapping[str, Agent], hook: guards.Hook | None, tries: int):
        """`tries` of a question whose answers cannot be used; the later ones show what was wrong."""
        self._output, self._agents, self._hook, self._tries = output, agents, hook, tries
        self._rules = f"guards {guards.VERSION}, moderator {guards.name_of(hook)}"
        self._templates: dict[str, PromptFile] = {}
        work = output / "work"
        work.mkdir(parents=True, exist_ok=True)
        work.chmod(0o700)  # drafts hold what nobody has reviewed
        self._files = contextlib.ExitStack()
        self._outcomes, self._log = (
            self._files.enter_context(Store.open(work, name)) for name in ("outcomes.jsonl", "log.jsonl")
        )
        # What more tries might mend is asked again.
        known = (o for o in self._outcomes.lines if o["kind"] != "unusable" or o["spent"]["tries"] >= tries)
        self._known = {outcome["key"]: outcome for outcome in known}
        self.aside: list[SetAside] = []
        self.rows: list[Row] = []

    def close(self) -> None:
        """Closes its files."""
        self._files.close()

    def set_aside(self, candidate: Candidate, stage: str, kind: str, reason: str) -> None:
        """Takes a candidate off the line."""
        self.aside.append(SetAside(candidate.id, candidate.picture.name, stage, kind, reason))

    def run(
        self,
        stage: Stage,
        candidates: Sequence[Candidate],
        material: Callable[[Candidate], Mapping[str, Any]],
        label: str | None = None,
    ) -> list[Candidate]:
        """Asks about every candidate; those that pass, in order, with their new values.

        Args:
          stage: what is asked.
          candidates: about what.
          material: what the template reads of a candidate.
          label: in the yield table; the stage's name if None.

        Raises:
          EndpointError: an agent cannot be used; what is known is kept.
        """
        row = Row(stage=label or stage.name, entered=len(candidates))
        self.rows.append(row)
        template = self._template(stage.name)
        asks = [self._ask(stage, template, candidate, material(candidate)) for candidate in candidates]
        keys = [self._key(stage, template, *pair) for pair in zip(candidates, asks, strict=True)]
        known = zip(candidates, asks, keys, strict=True)
        self._ask_all(stage, [_Question(c, ask, key, ask.user) for c, ask, key in known if key not in self._known])
        passed = []
        for candidate, key in zip(candidates, keys, strict=True):
            told = self._known.get(key)
            if told is None:  # nothing was answered; the next run asks again
                self.set_aside(candidate, row.stage, "unanswered", "no answer came through; run again")
                row.lose("unanswered")
                continue
            row.spend(Spent(**told["spent"]))
            if told["kind"] is not None:
                self.set_aside(candidate, row.stage, told["kind"], told["reason"])
                row.lose(told["kind"])
                continue
            candidate.values |= told["values"]
            candidate.trail.append(told["by"])
            self._mark(stage, candidate)
            passed.append(candidate)
        row.passed = len(passed)
        return passed

    def _mark(self, stage: Stage, candidate: Candidate) -> None:
        told_in_words = stage.sees and self._agents[stage.role].sees == "description"
        for mark in (stage.ours, "picture replaced by its description" if told_in_words else None):
            if mark and mark not in candidate.marks:
                candidate.marks.append(mark)

    def _template(self, name: str) -> PromptFile:
        if name not in self._templates:
            self._templates[name] = PromptFile(name, TEMPLATES)
        return self._templates[name]

    def _ask(self, stage: Stage, template: PromptFile, candidate: Candidate, material: Mapping[str, Any]) -> Ask:
        words = stage.sees and self._agents[stage.role].sees == "description"
        prompt = template.render({"description": candidate.picture.description if words else None, **material})
        images = (self._output / candidate.picture.stored,) if stage.sees and not words else ()
        return Ask(stage.name, prompt.system, prompt.user, images, stage.schema)

    def _key(self, stage: Stage, template: PromptFile, candidate: Candidate, ask: Ask) -> str:
        picture = candidate.picture.stored_sha256 if ask.images else None
        whole: list[Any] = [candidate.id, stage.name, template.sha256, self._agents[stage.role].name, self._rules]
        whole += [ask.system, ask.user, picture, stage.schema]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def _ask_all(self, stage: Stage, todo: list[_Question]) -> None:
        """Asks, and asks again what could not be used, until all is known or the tries are used up."""
        while todo:
            again: list[_Question] = []
            for index, reply in self._agents[stage.role].ask([question.ask for question in todo]):
                # JSON can spell halves of characters, which no file can hold.
                reply = dataclasses.replace(reply, text=reply.text.encode("utf-8", "replace").decode())
                if (error := self._settle(stage, todo[index], reply)) is not None:
                    answer = reply.text if reply.status is ReplyStatus.OK else f"({reply.status})"
                    again.append(self._again(todo[index], answer, error))
            todo = sorted(again, key=lambda question: question.candidate.id)

    def _again(self, question: _Question, answer: str, error: str) -> _Question:
        material = {"prompt": question.first, "answer": answer[:4000], "error": error}
        prompt = self._template("retry").render(material)
        return dataclasses.replace(question, ask=dataclasses.replace(question.ask, user=prompt.user))

    def _settle(self, stage: Stage, question: _Question, reply: Reply) -> str | None:
        """Logs a reply and keeps what came of it; the error, if it is to be asked again."""
        agent, candidate = self._agents[stage.role], question.candidate
        cost = agent.cost(reply)
        question.spent.add(reply, cost)
        kind, reason, values = self._judge(stage, candidate, reply)
        by = self._provenance(stage, reply)
        asked: dict[str, Any] = {"system": question.ask.system, "prompt": redact(question.ask.user)}
        pictures = [candidate.picture.stored_sha256] * len(question.ask.images)
        told = {"status": reply.status, "answer": None if kind == "guard" else redact(reply.text)}
        tokens = {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens, "cost": cost}
        verdict = {"kind": kind, "reason": reason and redact(reason)}
        tries = question.spent.tries
        self._log.append(
            {**by, "id": candidate.id, "try": tries, **asked, "images": pictures, **told, **tokens, **verdict}
        )
        if kind == "unanswered":
            return None
        if kind == "unusable" and tries < self._tries:
            return reason
        outcome: dict[str, Any] = {
            "key": question.key,
            "stage": stage.name,
            "id": candidate.id,
            "kind": kind,
            "reason": reason,
        }
        outcome |= {"values": values, "by": by, "spent": dataclasses.asdict(question.spent)}
        self._known[question.key] = outcome
        self._outcomes.append(outcome)
        return None

    def _provenance(self, stage: Stage, reply: Reply) -> dict[str, Any]:
        agent, template = self._agents[stage.role], self._template(stage.name)
        return {
            "agent": stage.role,
            "stage": stage.name,
            "template": template.stem,
            "version": template.version,
            "sha256": template.sha256,
            "model": agent.name if reply.model in (None, "None") else reply.model,
            "asked": agent.name,
        }

    def _judge(self, stage: Stage, candidate: Candidate, reply: Reply) -> tuple[str | None, str | None, dict[str, Any]]:
        """(kind, reason, values) of a reply: kind None if it passes."""
        if reply.status in (ReplyStatus.REFUSED, ReplyStatus.FILTERED):
            return "declined", f"{reply.status}: {redact(reply.text)}", {}
        if reply.status is ReplyStatus.REJECTED:
            return "rejected", redact(reply.text), {}
        if reply.status is ReplyStatus.CUT:
            return "unusable", "it was cut off at the token limit; answer more briefly (or raise max_tokens)", {}
        if reply.status not in ANSWERS:
            return "unanswered", f"{reply.status}: {redact(reply.text)}", {}
        try:
            # JSON may spell a word in escapes, which must not hide it, even where the rest cannot be read.
            self.check([reply.text, ESCAPE.sub(lambda match: chr(int(match[1], 16)), reply.text)])
            values = stage.read(parse(stage, reply.text), candidate.values)
            if any("\ud800" <= character <= "\udfff" for text in guards.strings(values) for character in text):
                raise Unusable("it holds halves of characters")
            return None, None, values
        except Refused as error:
            return "guard", str(error), {}
        except Unusable as error:
            return "unusable", str(error), {}
        except Excluded as error:
            return "excluded", redact(str(error)), {}

    def check(self, texts: Iterable[str]) -> None:
        """Lets texts pass that neither the rules nor the hook refuse.

        Raises:
          Refused: they do; tells the rule.
        """
        texts = list(texts)
        if rule := guards.hard_refusal("\n".join(texts)):
            raise Refused(rule)
        for text in texts:
            if reason := guards.moderated(self._hook, "text", text):
                raise Refused(f"moderator: {reason}")
