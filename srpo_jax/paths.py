"""The grammar of a reasoning path: render a record into text segments, parse model output back.

An assistant turn is a path between two tags, then an answer:

    <think>
    Step 1: Analyze Visual Context
    The picture shows ...
    Step 2: Analyze Textual Request
    ...
    </think>
    The answer to the user.

The six titles are those of the SSUI data set (Cai et al., AAAI-26). Rendering returns segments that are tokenised one by
one and concatenated, so that every prefix of steps is a token prefix of the whole. Parsing reads untrusted model output:
it never raises, and it gives an answer only if exactly one path was opened at the start, closed, and the turn ended.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
from collections.abc import Sequence

STEP_TITLES = (
    "Analyze Visual Context",
    "Analyze Textual Request",
    "Synthesize Visual and Textual Cues",
    "Determine Deeper Intent and Categorize Risk",
    "Evaluate Potential Consequences",
    "Formulate Safety-Aligned Response Strategy",
)


class Status(enum.StrEnum):
    """What became of a generated turn. Faults that no continuation can repair are named before truncation.

    Members, in the order in which `parse` decides:
      NO_OPEN: the text does not begin with the opening tag, so there is no path to judge.
      MULTIPLE: a second opening or closing tag; where the answer begins is ambiguous.
      TRUNCATED: the generation hit its length limit, inside the path or inside the answer.
      NO_CLOSE: the turn ended inside the path.
      EMPTY: the path has no text, one of its steps has none, or the answer has none.
      OK: one closed path and an answer.
      LOOP: not from `parse`: the sampler cut a turn that repeated itself.
    """

    OK = "ok"
    NO_OPEN = "no_open"
    NO_CLOSE = "no_close"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    MULTIPLE = "multiple"
    LOOP = "loop"


@dataclasses.dataclass(frozen=True)
class Step:
    """One step as found in a text.

    Attributes:
      number: as written in its heading; 0 for text that stands before the first heading.
      title: as written, without surrounding white space; "" for text before the first heading.
      text: the body, without surrounding white space.
    """

    number: int
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class ParsedPath:
    """A parsed assistant turn.

    Attributes:
      status: see `Status`. It speaks of tags, truncation and emptiness only.
      steps: the steps as found, whatever their numbers, titles and order; `deviations` tells how they differ from a
        grammar. Text without any heading is a single step of number 0.
      answer: the text after the closing tag, stripped; None unless `status` is `Status.OK`.
    """

    status: Status
    steps: tuple[Step, ...]
    answer: str | None

    def deviations(self, grammar: Grammar | None = None) -> tuple[str, ...]:
        """How the steps differ from the grammar's numbers, titles and order, one line each; () if they follow it."""
        grammar = grammar or Grammar()
        titles = grammar.titles
        found = []
        for index, step in enumerate(self.steps):
            if index >= len(titles):
                found.append(f"a path has {len(titles)} steps; found one more, step {step.number} {step.title!r}")
            elif not grammar.marker:
                pass  # text without headings is what it is
            elif step.number == 0:
                # Everything after it is shifted by one: further lines would only repeat this one.
                return ("text stands before the first step heading",)
            elif step.number != index + 1:
                found.append(f"step {index + 1} is numbered {step.number}")
            elif step.title != titles[index]:
                found.append(f"step {step.number} is titled {step.title!r} instead of {titles[index]!r}")
        if len(self.steps) < len(titles):
            found.append(f"a path has {len(titles)} steps; found {len(self.steps)}")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The strings around a path and its steps.

    Attributes:
      opening: starts the path; its stripped form is the opening tag.
      closing: ends the path; its stripped form is the closing tag.
      marker: a step's heading, one line with the fields `{number}` and `{title}`; "" for a path of a single step without one.
      titles: the step titles in order; their number is the number of steps. () for no path: the turn is the answer, without
        tags.
      digest: for each step, numbers of the reference steps whose first sentences are its body; None where the steps are those
        of the reference path.

    Raises:
      ValueError: if the strings cannot be told apart when parsing.
    """

    opening: str = "<think>\n"
    closing: str = "</think>\n"
    marker: str = "Step {number}: {title}\n"
    titles: tuple[str, ...] = STEP_TITLES
    digest: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.digest is not None and (len(self.digest) != len(self.titles) or not all(self.digest)):
            raise ValueError(f"digest {self.digest} must name reference steps for each of {len(self.titles)} steps")
        if not self.opening_tag or not self.closing_tag:
            raise ValueError("opening and closing must contain more than white space")
        if self.opening_tag in self.closing_tag or self.closing_tag in self.opening_tag:
            raise ValueError(f"opening {self.opening!r} and closing {self.closing!r} contain each other")
        if not self.marker:
            if self.titles not in ((), ("",)):
                raise ValueError(f"without a marker a path is one step without a title, not {self.titles}")
            return
        if not self.titles:
            raise ValueError("a grammar needs at least one step title, or no marker where there is no path")
        one_line = self.marker.endswith("\n") and self.marker.count("\n") == 1
        if not one_line or self.marker.count("{number}") != 1 or self.marker.count("{title}") != 1:
            raise ValueError(f"marker {self.marker!r} must be one line, end in \\n, hold {{number}} and {{title}} once")

    @property
    def opening_tag(self) -> str:
        return self.opening.strip()

    @property
    def closing_tag(self) -> str:
        return self.closing.strip()

    @functools.cached_property
    def heading(self) -> re.Pattern[str]:
        """Matches a line that has the shape of a step heading, with groups `number` and `title`."""
        if not self.marker:
            return re.compile("(?!)(?P<number>)(?P<title>)")  # matches nothing
        pattern = re.escape(self.marker.rstrip("\n"))
        # Few digits: int() refuses very long numbers, and a model may write one.
        pattern = pattern.replace(re.escape("{number}"), "(?P<number>[0-9]{1,4})")
        pattern = pattern.replace(re.escape("{title}"), r"(?P<title>[^\n]*)")
        return re.compile(f"^{pattern}$", re.MULTILINE)

    def step_problems(self, body: str) -> list[str]:
        """Why `body` cannot be the text of a step; [] if it can."""
        problems = self.answer_problems(body)
        if match := self.heading.search(body):
            problems.append(f"contains the step heading {match.group()!r}; reword that line")
        return problems

    def answer_problems(self, text: str) -> list[str]:
        """Why `text` cannot be an answer; [] if it can."""
        problems = [] if text.strip() else ["is empty"]
        tags = [tag for tag in (self.opening_tag, self.closing_tag) if tag in text]
        return problems + [f"contains the tag {tag}; remove it" for tag in tags]

    def render(self, steps: Sequence[str], answer: str) -> list[str]:
        """The assistant turn as S + 1 segments: one per step (the first begins with `opening`), then closing + answer.

        The segments joined together are the full assistant text. Prefix i of a path is the first i segments.

        Args:
          steps: one body per title; `bodies` makes them from a reference path.
          answer: the reply after the path.

        Raises:
          ValueError: if the number of steps is wrong, or a text is empty or holds a tag or a heading, because the
            result would not parse back.
        """
        if len(steps) != len(self.titles):
            raise ValueError(f"a path has {len(self.titles)} steps, not {len(steps)}")
        problems = [f"step {i}: {p}" for i, body in enumerate(steps, 1) for p in self.step_problems(body)]
        problems += [f"answer: {p}" for p in self.answer_problems(answer)]
        if problems:
            raise ValueError("; ".join(problems))
        segments = [self.heading_line(i) + body + "\n" for i, body in enumerate(steps, 1)]
        if not segments:
            return [answer]
        segments[0] = self.opening + segments[0]
        return [*segments, self.closing + answer]

    def bodies(self, reference: Sequence[str]) -> tuple[str, ...]:
        """What the steps of this grammar say of a reference path: its steps as they are, or their digest."""
        if self.digest is None:
            return tuple(reference)
        return tuple(" ".join(_first_sentence(reference[number - 1]) for number in part) for part in self.digest)

    def heading_line(self, number: int) -> str:
        """The heading of step `number`, counted from 1, with its line end."""
        return self.marker.replace("{number}", str(number)).replace("{title}", self.titles[number - 1])


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])[\"')\]]*\s", text.strip(), maxsplit=1)[0]


STYLES = types.MappingProxyType(
    {
        "long": Grammar(),
        "short": Grammar(marker="", titles=("",), digest=((3, 4, 6),)),
        "template": Grammar(
            marker="Check {number}: {title}\n",
            titles=("What the picture shows", "What is asked", "What both mean together", "How to answer"),
            digest=((1,), (2,), (3,), (6,)),
        ),
        "none": Grammar(marker="", titles=(), digest=()),
    }
)
"""How much a path says, from the same record: all six steps; one paragraph without headings; four fixed checks of a sentence
each; no path at all. Which of them a model should learn is an open question (arXiv 2505.15404 asks it for text)."""


def parse(text: str, *, stopped: bool, grammar: Grammar | None = None) -> ParsedPath:
    """Parses an assistant turn; never raises, whatever the text.

    Args:
      text: the whole turn, from the end of the generation prompt. For a branch: the prefix it continues, then its own
        text.
      stopped: whether the generation reached its end-of-turn token (False: it hit the length limit).
      grammar: the default grammar if None.

    Returns:
      Status, steps as found and, only for `Status.OK`, the answer.
    """
    grammar = grammar or Grammar()
    opening, closing = grammar.opening_tag, grammar.closing_tag
    turn = text.strip()
    if not grammar.titles:
        return _parse_answer(turn, stopped, grammar)
    if not turn.startswith(opening):
        # A turn cut inside its first tag is truncated rather than unopened.
        cut = not stopped and opening.startswith(turn)
        return ParsedPath(Status.TRUNCATED if cut else Status.NO_OPEN, (), None)
    path, closed, answer = turn[len(opening) :].partition(closing)
    steps = _split_steps(path.partition(opening)[0], grammar)
    if turn.count(opening) > 1 or turn.count(closing) > 1:
        status = Status.MULTIPLE
    elif not stopped:
        status = Status.TRUNCATED
    elif not closed:
        status = Status.NO_CLOSE
    elif not steps or not answer.strip() or not all(step.text for step in steps):
        status = Status.EMPTY
    else:
        status = Status.OK
    return ParsedPath(status, steps, answer.strip() if status is Status.OK else None)


def _parse_answer(turn: str, stopped: bool, grammar: Grammar) -> ParsedPath:
    """A turn that is nothing but the answer."""
    if grammar.opening_tag in turn or grammar.closing_tag in turn:
        return ParsedPath(Status.MULTIPLE, (), None)
    if not stopped:
        return ParsedPath(Status.TRUNCATED, (), None)
    return ParsedPath(Status.OK, (), turn) if turn else ParsedPath(Status.EMPTY, (), None)


def _split_steps(path: str, grammar: Grammar) -> tuple[Step, ...]:
    headings = list(grammar.heading.finditer(path))
    ends = [match.start() for match in headings] + [len(path)]
    before = path[: ends[0]].strip()
    steps = [Step(0, "", before)] if before else []
    for match, end in zip(headings, ends[1:], strict=True):
        steps.append(Step(int(match["number"]), match["title"].strip(), path[match.end() : end].strip()))
    return tuple(steps)
