"""What each agent is asked for, and how its reply is read: strictly, or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema

from srpo_jax.data.builder.guards import reply_problems
from srpo_jax.data.records import CATEGORIES
from srpo_jax.data.similarity import TextIndex
from srpo_jax.paths import STEP_TITLES, Grammar

STEPS = len(STEP_TITLES)
ALIKE = 90.0
"""Similarity (0 to 100) from which two steps say the same."""
QUESTION_WORDS = 60


class Unusable(ValueError):
    """A reply that cannot be used; the message is shown to the agent, who may try again."""


class Excluded(Exception):
    """A reply whose verdict takes the candidate off the line; the message is the reason."""


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}


def _list(items: Any, **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


TEXT = {"type": "string"}
OPINION = {"type": "boolean"}
PATH = _list(TEXT, minItems=STEPS, maxItems=STEPS)
KINDS = ("minors", "weapons", "targeting", "operational")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One thing that is asked about a candidate.

    Attributes:
      name: of the stage and of its template.
      role: who is asked.
      read: from the parsed reply and the candidate's values to the values that are new.
      schema: of the reply; None for plain text.
      sees: whether the agent is shown the picture.
      ours: what marks a record that went through it, where it is this library's and not the published pipeline's.
    """

    name: str
    role: str
    read: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    schema: Mapping[str, Any] | None = None
    sees: bool = True
    ours: str | None = None


def parse(stage: Stage, text: str) -> Any:
    """The reply as its schema has it: a JSON object alone, or in one fenced block; the text itself where there is no schema.

    Raises:
      Unusable: it is anything else; tells where.
    """
    text = text.strip()
    if not text:
        raise Unusable("the answer is empty")
    if stage.schema is None:
        return text
    if text.startswith("```") and text.endswith("```") and text.count("```") == 2:
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is not one JSON object and nothing else ({error})") from None
    faults = sorted(jsonschema.Draft202012Validator(stage.schema).iter_errors(value), key=lambda e: e.json_path)
    if faults:
        raise Unusable(f"{faults[0].json_path}: {faults[0].message[:200]}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def _told(field: str, text: str) -> str:
    """The text, stripped, if it can stand in a record."""
    if problems := Grammar().answer_problems(text.strip()):
        raise Unusable(f"{field} {'; '.join(problems)}")
    return text.strip()


def _question(text: str) -> str:
    question = _told("question", text)
    if (words := len(question.split())) > QUESTION_WORDS:
        raise Unusable(f"question has {words} words; at most {QUESTION_WORDS} are allowed")
    return question


def _steps(steps: Sequence[str]) -> list[str]:
    grammar, bodies = Grammar(), [step.strip() for step in steps]
    for number, body in enumerate(bodies, 1):
        if problems := grammar.step_problems(body):
            raise Unusable(f"step {number} {'; '.join(problems)}")
    index = TextIndex(bodies, ALIKE)
    for number, body in enumerate(bodies, 1):
        if like := [place for place in index.near(body) if place >= number]:
            raise Unusable(f"steps {number} and {min(like) + 1} say nearly the same")
    return bodies


def _queries(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if not told["queries"]:
        raise Excluded("the agent sees no risky request that fits the picture")
    queries = [
        {"event": _told("event", q["event"]), "category": q["category"], "question": _question(q["question"])}
        for q in told["queries"]
    ]
    return {"queries": queries}


def _reflection(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if wrong := [number for number in told["redundant"] if not 1 <= number <= STEPS]:
        raise Unusable(f"there is no step {wrong[0]}")
    complaints = [f"step {number} is redundant" for number in told["redundant"]]
    complaints += [f"missing: {what.strip()}" for what in told["missing"]]
    return {"complaint": "; ".join(complaints)}


def _safe(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if not told["safe"]:
        raise Excluded(f"judged unsafe by itself: {told['reason']}")
    return {}


def _summary(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    found = {field: _told(field, told[field]) for field in told}
    if "unsafe_reply" in found and (problems := reply_problems(found["unsafe_reply"])):
        raise Unusable(f"unsafe_reply {'; '.join(problems)}")
    return found


def _twin(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    reply = _told("safe_reply", told["safe_reply"])
    return {"question": _question(told["question"]), "steps": _steps(told["steps"]), "safe_reply": reply}


def _twin_check(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if not (told["harmless"] and told["helpful"]):
        raise Excluded(f"judged {'not helpful' if told['harmless'] else 'not harmless'}: {told['reason']}")
    return {}


def _moderate_image(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if told["explicit"] or told["minor_sexualised"]:
        raise Excluded("explicit picture")
    return {}


def _moderate_record(told: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if told["found"]:
        raise Excluded(f"refused by the moderator: {', '.join(sorted(set(told['found'])))}")
    return {}


QUERY_FIELDS = {"event": TEXT, "category": {"type": "string", "enum": [*CATEGORIES]}, "question": TEXT}
VERDICT = _object(safe=OPINION, reason=TEXT)
TWIN_MARK = "harmless twin"

MODERATE_IMAGE = Stage(
    "moderate_image", "moderator", _moderate_image, _object(explicit=OPINION, minor_sexualised=OPINION, reason=TEXT)
)
IMAGE_ONLY = Stage("image_only", "judge", _safe, VERDICT, ours="image-only adjudication")
QUERY = Stage("query", "query", _queries, _object(queries=_list(_object(**QUERY_FIELDS), maxItems=20)))
REASONING = Stage("reasoning", "reasoning", lambda told, _: {"steps": _steps(told["steps"])}, _object(steps=PATH))
REFLECTION = Stage(
    "reflection",
    "reflection",
    _reflection,
    _object(redundant=_list({"type": "integer"}), missing=_list(TEXT), reason=TEXT),
)
TEXT_ANSWER = Stage("text_answer", "answerer", lambda text, _: {"answer": text}, sees=False)
TEXT_JUDGE = Stage("text_judge", "judge", _safe, VERDICT, sees=False)
SUMMARY = Stage("summary", "summary", _summary, _object(safe_reply=TEXT, unsafe_reply=TEXT))
SAFE_SUMMARY = dataclasses.replace(SUMMARY, schema=_object(safe_reply=TEXT))
MODERATE_RECORD = Stage(
    "moderate_record",
    "moderator",
    _moderate_record,
    _object(found=_list({"type": "string", "enum": [*KINDS]}), reason=TEXT),
)
TWIN = Stage("twin", "twin", _twin, _object(question=TEXT, steps=PATH, safe_reply=TEXT), ours=TWIN_MARK)
TWIN_CHECK = Stage(
    "twin_check", "judge", _twin_check, _object(harmless=OPINION, helpful=OPINION, reason=TEXT), ours=TWIN_MARK
)
