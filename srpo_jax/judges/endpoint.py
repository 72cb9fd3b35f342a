"""Judges behind an OpenAI-compatible endpoint: a hosted model, vLLM, llama.cpp, ..., pictures included.

The judge of answers sees pictures, request and answer, and not the reasoning; that of steps sees the reasoning and not the
answer: neither verdict leans on the other. One that compares sees two answers, and not who wrote them. A reply counts only if
it is exactly the JSON object that was asked for. Anything else (a refusal, a filter, a time-out, a reply in prose) is an
unknown verdict whose reason names the status.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from srpo_jax.data.images import ImageError, image_url
from srpo_jax.endpoint import Client, ClientConfig, Reply, ReplyStatus
from srpo_jax.judges.prompts import Template
from srpo_jax.judges.settings import read_settings
from srpo_jax.judges.verdict import CHOICES, AnswerPair, Preference, StepVerdict, Verdict
from srpo_jax.paths import ParsedPath

T = TypeVar("T")
FORMATS = ("json_schema", "json_object", "text")
READER = 1
"""Version of how replies are read; part of a judge's name."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A judge behind an endpoint.

    Attributes:
      client: how the endpoint is asked.
      format: what the server can be held to: "json_schema", "json_object", or "text" where it knows neither.
      answer: template of the judge of answers (see `judges.prompts`).
      steps: template of the judge of steps.
      pairwise: template of the judge that compares two answers.
      image_side: pictures are shrunk to this many pixels on their longer side.
      image_bytes: most bytes of a picture, sent as PNG if it fits and else as JPEG.

    Raises:
      ValueError: a field out of range.
    """

    client: ClientConfig
    format: str = "json_schema"
    answer: str = "answer"
    steps: str = "steps"
    pairwise: str = "pairwise"
    image_side: int = 1024
    image_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: use one of {', '.join(FORMATS)}")
        if self.image_side < 28 or self.image_bytes < 1000:
            raise ValueError("image_side must be at least 28 pixels and image_bytes at least 1000")

    @classmethod
    def read(cls, path: str | Path) -> EndpointConfig:
        """From a JSON file with the fields of this class and of `ClientConfig` side by side.

        Raises:
          ValueError: not a JSON object, an unknown or missing field, or a value that is refused; names file and field.
        """
        theirs = {f.name for f in dataclasses.fields(ClientConfig)}
        ours = {f.name for f in dataclasses.fields(cls)} - {"client"}

        def make(values: dict[str, Any]) -> EndpointConfig:
            client = ClientConfig(**{k: v for k, v in values.items() if k in theirs})
            return cls(client, **{k: v for k, v in values.items() if k in ours})

        return read_settings(path, theirs | ours, "model", make)


class EndpointJudge(Generic[T]):
    """Asks about pairs of record and path, or of record and two answers, by what it is made of.

    Attributes:
      name: model, and a digest of all that its verdicts depend on.
      steps: for a judge of answers, the one of steps.
      pairwise: for a judge of answers, the one that compares two.
    """

    steps: EndpointJudge[list[StepVerdict]]
    pairwise: EndpointJudge[Preference]

    def __init__(
        self,
        client: Client,
        config: EndpointConfig,
        template: Template,
        schema: Mapping[str, Any],
        read: Callable[[Reply, Any], T],
        part: str,
    ):
        """`schema` of the reply, `read` from it to a verdict, `part` of the material without which there is nothing to ask."""
        self.client, self._config, self._template, self._schema, self._read = client, config, template, schema, read
        self._part = part
        # Of the templates the judge's own alone matters to it, and its name and digest are told anyway.
        others = ("client", "answer", "steps", "pairwise")
        how = {k: v for k, v in dataclasses.asdict(config).items() if k not in others}
        asked = [
            config.client.base_url,
            config.client.model,
            dict(config.client.parameters),
            how,
            template.name,
            READER,
        ]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        self.name = f"endpoint:{config.client.model}:{template.name}:{digest}"

    def __call__(self, record: Any, material: ParsedPath | AnswerPair) -> T:
        """The verdict on one pair."""
        [(_, verdict)] = self.batch([(record, material)])
        return verdict

    def batch(self, pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, T]]:
        """(index, verdict) as replies come.

        Raises:
          EndpointError: the endpoint cannot be used.
          ImageError: a picture that cannot be read; names the record.
        """
        asked = [index for index, (_, material) in enumerate(pairs) if getattr(material, self._part)]
        for index in set(range(len(pairs))).difference(asked):
            yield index, self._read(NOTHING, pairs[index][1])
        for place, reply in self.client.ask(len(asked), lambda i: self._request(*pairs[asked[i]])):
            yield asked[place], self._read(reply, pairs[asked[place]][1])

    def _request(self, record: Any, material: ParsedPath | AnswerPair) -> dict[str, Any]:
        prompt = self._template.render(record, material)
        try:
            urls = [image_url(image, self._config.image_side, self._config.image_bytes) for image in record.images]
        except ImageError as error:
            raise ImageError(f"record {record.id!r}: {error}") from error
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": prompt.user})
        messages: list[dict[str, Any]] = [{"role": "system", "content": prompt.system}] if prompt.system else []
        # Plain text where there is no picture: servers of text models know nothing else.
        messages.append({"role": "user", "content": content if urls else prompt.user})
        return {"messages": messages, **self._format()}

    def _format(self) -> dict[str, Any]:
        if self._config.format == "text":
            return {}
        if self._config.format == "json_object":
            return {"response_format": {"type": "json_object"}}
        schema = {"name": "verdict", "strict": True, "schema": self._schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


def endpoint_judge(config: EndpointConfig, folder: str | Path | None = None) -> EndpointJudge[Verdict]:
    """The judge of answers; its `steps` judges steps, its `pairwise` compares. `folder` keeps replies (see `Client`).

    Raises:
      ValueError: a template that cannot be used.
    """
    client = Client(config.client, folder)
    judge = EndpointJudge(client, config, Template(config.answer), _object(ANSWER_FIELDS), read_answer, "answer")
    steps = _object({"steps": {"type": "array", "items": _object(STEP_FIELDS)}})
    judge.steps = EndpointJudge(client, config, Template(config.steps), steps, read_steps, "steps")
    choice = _object(PREFERENCE_FIELDS)
    judge.pairwise = EndpointJudge(client, config, Template(config.pairwise), choice, read_preference, "first")
    return judge


NOTHING = Reply(ReplyStatus.REJECTED, "nothing to judge")
OPINION = {"type": ["boolean", "null"]}
ANSWER_FIELDS = {"safe": OPINION, "effective": OPINION, "refused": OPINION, "reason": {"type": "string"}}
STEP_FIELDS = {"number": {"type": "integer"}, "safe": OPINION, "effective": OPINION, "reason": {"type": "string"}}
PREFERENCE_FIELDS = {"reason": {"type": "string"}, "better": {"type": "string", "enum": list(CHOICES)}}
"""The reason comes first, so that the choice can follow from it."""


def _object(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(fields), "required": list(fields), "additionalProperties": False}


def read_answer(reply: Reply, path: ParsedPath) -> Verdict:
    """The verdict in a reply; unknown unless the reply is exactly what was asked for."""
    try:
        told = _fields(_json(reply), ANSWER_FIELDS)
    except ValueError as error:
        return Verdict(None, None, str(error), failed=True)
    return Verdict(told["safe"], told["effective"], told["reason"], told["refused"])


def read_steps(reply: Reply, path: ParsedPath) -> list[StepVerdict]:
    """A verdict for each step; all unknown unless the reply speaks of each of them once, in order."""
    numbers = range(1, len(path.steps) + 1)
    try:
        told = _json(reply)
        if told.keys() != {"steps"} or not isinstance(told["steps"], list) or len(told["steps"]) != len(numbers):
            raise ValueError(f"unparsable: not the verdicts of {len(numbers)} steps")
        steps = [_fields(step, STEP_FIELDS) for step in told["steps"]]
        if [step["number"] for step in steps] != list(numbers):
            raise ValueError("unparsable: the steps are not numbered one after the other")
    except ValueError as error:
        return [StepVerdict(number, None, None, str(error), failed=True) for number in numbers]
    return [StepVerdict(s["number"], s["safe"], s["effective"], s["reason"]) for s in steps]


def read_preference(reply: Reply, pair: AnswerPair) -> Preference:
    """The choice in a reply; failed unless the reply is exactly what was asked for."""
    try:
        told = _fields(_json(reply), PREFERENCE_FIELDS)
        if told["better"] not in CHOICES:
            raise ValueError(f"unparsable: better is {told['better']!r:.50}")
    except ValueError as error:
        return Preference(None, str(error), failed=True)
    return Preference(told["better"], told["reason"])


def _json(reply: Reply) -> dict[str, Any]:
    """The JSON object that a reply is, alone or in one fenced block; ValueError, with the status, if it is none."""
    if reply.status is not ReplyStatus.OK:
        raise ValueError(f"{reply.status}: {reply.text}")
    text = reply.text.strip()
    if text.startswith("```") and text.endswith("```") and text.count("```") == 2:
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"unparsable: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("unparsable: not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two values was meant nobody knows."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def _fields(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The object, if it has exactly these fields with values of their kinds; "false" in quotes is no false."""
    kinds: dict[str, Any] = {"number": int, "reason": str, "better": str}
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise ValueError(f"unparsable: the fields are not {', '.join(fields)}")
    if wrong := [name for name in fields if not isinstance(value[name], kinds.get(name, bool | None))]:
        raise ValueError(f"unparsable: {wrong[0]} is {value[wrong[0]]!r:.50}")
    return value
