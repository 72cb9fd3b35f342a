"""Who is asked: agents behind an OpenAI-compatible endpoint, or whatever else answers prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from srpo_jax.data.images import image_url
from srpo_jax.endpoint import Client, ClientConfig, Reply

ROLES = ("query", "reasoning", "reflection", "answerer", "judge", "summary", "twin", "moderator")
"""Who does what: docs/data.md. `answerer` is the text model whose replies without the picture are judged."""
SEES = ("pixels", "description")
FORMATS = ("json_schema", "json_object", "text")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One question to an agent.

    Attributes:
      name: of the reply's schema.
      system: "" for none.
      user: text.
      images: files shown before the text.
      schema: JSON schema of the reply; None for plain text.
    """

    name: str
    system: str
    user: str
    images: tuple[Path, ...] = ()
    schema: Mapping[str, Any] | None = None


class Agent(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """The model, and a digest of all that its answers depend on beside the prompt."""

    @property
    def sees(self) -> str:
        """ "pixels" if it reads pictures, "description" if it is told in words what they show."""

    @property
    def remote(self) -> bool:
        """Whether what it is asked leaves this machine."""

    def ask(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) as they come, one for each ask."""

    def cost(self, reply: Reply) -> float | None:
        """Of a reply, in the agent's currency; None where it is not known."""


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """An agent behind an endpoint.

    Attributes:
      client: how the endpoint is asked.
      format: what the server can be held to: "json_schema", "json_object", or "text" where it knows neither.
      sees: "pixels", or "description" for a text model that is told the manifest's description of the picture instead.
      image_side: pictures are shrunk to this many pixels on their longer side.
      image_bytes: most bytes of a picture.

    Raises:
      ValueError: a field out of range.
    """

    client: ClientConfig
    format: str = "json_schema"
    sees: str = "pixels"
    image_side: int = 1024
    image_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        for name, allowed in (("format", FORMATS), ("sees", SEES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if self.image_side < 28 or self.image_bytes < 1000:
            raise ValueError("image_side must be at least 28 pixels and image_bytes at least 1000")


class EndpointAgent:
    """An `Agent` behind an OpenAI-compatible endpoint; pictures travel as data URLs."""

    def __init__(self, settings: EndpointSettings):
        # Replies are kept by the builder, checked and without what its guards refuse; so the client keeps none.
        self._settings, self._client = settings, Client(settings.client)
        client = settings.client
        answers = [client.base_url, client.model, dict(client.parameters), *dataclasses.astuple(settings)[1:]]
        digest = hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()[:12]
        self.name, self.sees, self.remote = f"{client.model}:{digest}", settings.sees, is_remote(client.base_url)

    def ask(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """See `Agent`.

        Raises:
          EndpointError: the endpoint cannot be used.
        """
        return self._client.ask(len(asks), lambda index: self._request(asks[index]))

    def cost(self, reply: Reply) -> float | None:
        """See `Agent`."""
        prices = self._settings.client.prices
        if not prices or reply.input_tokens is None or reply.output_tokens is None:
            return None
        return (reply.input_tokens * prices["input"] + reply.output_tokens * prices["output"]) / 1e6

    def _request(self, ask: Ask) -> dict[str, Any]:
        settings = self._settings
        urls = [image_url(image, settings.image_side, settings.image_bytes) for image in ask.images]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages: list[dict[str, Any]] = [{"role": "system", "content": ask.system}] if ask.system else []
        # Plain text where there is no picture: servers of text models know nothing else.
        content.append({"type": "text", "text": ask.user})
        messages.append({"role": "user", "content": content if urls else ask.user})
        if ask.schema is None or settings.format == "text":
            return {"messages": messages}
        if settings.format == "json_object":
            return {"messages": messages, "response_format": {"type": "json_object"}}
        schema = {"name": ask.name, "strict": True, "schema": ask.schema}
        return {"messages": messages, "response_format": {"type": "json_schema", "json_schema": schema}}


def is_remote(base_url: str) -> bool:
    """Whether requests to an endpoint leave this machine: any host but a loopback address, or a proxy on the way."""
    address = urllib.parse.urlsplit(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    host = address.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    proxies = urllib.request.getproxies()
    proxied = bool(proxies.get(address.scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host)
    return not local or proxied


def read_agents(spec: str, local: Callable[[dict[str, Any]], Agent] | None = None) -> dict[str, Agent]:
    """The agent of each role.

    Args:
      spec: "MODEL@URL" for one endpoint in every role; or a JSON file that gives settings for "default" and, where they differ,
        for roles: fields of `EndpointSettings` and `ClientConfig` side by side, or {"checkpoint": FOLDER, ...} for `local`.
      local: makes an agent of the settings of a checkpoint.

    Raises:
      ValueError: a file that cannot be used; names file, role and field.
    """
    if not spec.endswith(".json"):
        model, _, url = spec.partition("@")
        return dict.fromkeys(ROLES, EndpointAgent(EndpointSettings(ClientConfig(model, url))))
    try:
        told = json.loads(Path(spec).read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.keys() - {"default", *ROLES}:
            raise ValueError(f"give a JSON object with any of default, {', '.join(ROLES)}")
        if missing := [role for role in ROLES if role not in told and "default" not in told]:
            raise ValueError(f"no settings for {', '.join(missing)}; name them, or a default")
    except (OSError, ValueError) as error:
        raise ValueError(f"{spec}: {error}") from None
    made: dict[str, Agent] = {}  # roles with the same settings share one agent, and its limit on requests
    agents = {}
    for role in ROLES:
        key = json.dumps(told.get(role, told.get("default")), sort_keys=True)
        try:
            agents[role] = made[key] if key in made else made.setdefault(key, _make(json.loads(key), local))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{spec}, {role}: {error}") from None
    return agents


def _make(values: Any, local: Callable[[dict[str, Any]], Agent] | None) -> Agent:
    if not isinstance(values, dict):
        raise ValueError("settings are a JSON object")
    if "checkpoint" in values:
        if local is None:
            raise ValueError("a checkpoint needs a caller that can run one; use scripts/build_ssui.py")
        return local(values)
    theirs = {field.name for field in dataclasses.fields(ClientConfig)}
    ours = {field.name for field in dataclasses.fields(EndpointSettings)} - {"client"}
    if values.keys() - theirs - ours or "model" not in values:
        raise ValueError(f"give model and any of {', '.join(sorted((theirs | ours) - {'model'}))}, or checkpoint")
    client = ClientConfig(**{k: v for k, v in values.items() if k in theirs})
    return EndpointAgent(EndpointSettings(client, **{k: v for k, v in values.items() if k in ours}))
