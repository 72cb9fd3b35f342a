"""Chat completions from an OpenAI-compatible endpoint: many at a time, patient, frugal, resumable, and never optimistic.

What comes back is a `Reply` with a status; only `ok` carries text to read. A model's refusal, a filter's stop and a cut-off
text are answers, too: they are kept. Time-outs, lost connections and garbage are not: they are tried again, then told.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import enum
import hashlib
import json
import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai

from srpo_jax.files import Store, read_family

REPLIES = "replies.jsonl"
MAX_BODY = 4 << 20
"""Bytes of a reply that are read; a long answer needs a few thousand."""
MAX_WAIT = 120.0
"""Seconds that a server may ask us to wait before the next try."""


class EndpointError(RuntimeError):
    """An endpoint that cannot be used at all: key, model, address or quota is wrong, or it is down."""


class ReplyStatus(enum.StrEnum):
    """What became of a request.

    Members:
      OK: text.
      REFUSED: the model declined to answer.
      FILTERED: a content filter stopped the question or the reply.
      CUT: the reply reached its token limit.
      REJECTED: the server will not take this request (too long, say).
      TIMEOUT: no whole reply in time.
      UNREACHABLE: the connection failed or broke off.
      BUSY: too many requests, still after the last try.
      SERVER_ERROR: a status of 500 or more.
      GARBAGE: not a chat completion.
    """

    OK = "ok"
    REFUSED = "refused"
    FILTERED = "filtered"
    CUT = "cut"
    REJECTED = "rejected"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    BUSY = "busy"
    SERVER_ERROR = "server_error"
    GARBAGE = "garbage"


ANSWERS = frozenset({ReplyStatus.OK, ReplyStatus.REFUSED, ReplyStatus.FILTERED, ReplyStatus.CUT})
AGAIN = frozenset(ReplyStatus) - ANSWERS - {ReplyStatus.REJECTED}


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply.

    Attributes:
      status: see `ReplyStatus`.
      text: of the reply where the status is ok, else what went wrong, for people.
      input_tokens: as the server counts them; None if it does not say.
      output_tokens: the same.
      model: who answered, as the server names it.
    """

    status: ReplyStatus
    text: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str | None = None


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """How an endpoint is asked.

    Attributes:
      model: as the server names it; prefer a dated version, aliases change under your feet.
      base_url: such as "http://localhost:8000/v1"; "" for the client library's default.
      key_variable: environment variable that holds the key. Keys stand nowhere else.
      parameters: fields of the request beside model and messages, sent as they are.
      concurrency: requests under way at a time.
      requests_per_minute: limit of ours; None for the server's own.
      timeout: seconds for one whole reply.
      retries: further tries after a failure.
      backoff: seconds before the first of them; doubled each time, with jitter. A server's Retry-After goes before.
      max_failures: failures in a row, each after its retries, at which the endpoint counts as down.
      prices: {"input", "output", "currency"}: of a million tokens. Without them no cost is told.

    Raises:
      ValueError: a field out of range, or credentials in `base_url`.
    """

    model: str
    base_url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0, "max_tokens": 800})
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 1.0
    max_failures: int = 8
    prices: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; name it as the server does")
        least = {"concurrency": 1, "retries": 0, "backoff": 0, "max_failures": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {bound}")
        if self.timeout <= 0 or (self.requests_per_minute is not None and self.requests_per_minute <= 0):
            raise ValueError("timeout and requests_per_minute must be above 0")
        if urllib.parse.urlsplit(self.base_url).username is not None:
            raise ValueError(f"base_url holds credentials; put the key into the environment ({self.key_variable})")
        if self.prices is not None and self.prices.keys() != {"input", "output", "currency"}:
            raise ValueError('prices needs exactly "input" and "output" (of a million tokens) and "currency"')


class Client:
    """Asks an endpoint.

    Attributes:
      usage: what was asked and answered through this object, see `spent`.
    """

    def __init__(self, config: ClientConfig, folder: str | Path | None = None):
        """`folder` keeps the answers in `replies.jsonl`, keyed on the whole request: none of them is paid for twice."""
        self.config, self._folder = config, folder
        self._key = os.environ.get(config.key_variable, "")
        self._slot = 0.0
        self._answered = False
        self.usage: collections.Counter[str] = collections.Counter()
        # Nothing is written before the first question: what cannot run leaves nothing behind.
        lines = () if folder is None else read_family(Path(folder) / REPLIES)
        self._known = {line["key"]: _from_line(line) for line in lines}

    def spent(self) -> dict[str, Any]:
        """Requests, replies by status, tokens and cost of this object's life.

        `cost` is None without prices, and where a server did not count tokens: it is never guessed.
        """
        told: dict[str, Any] = dict(self.usage)
        prices = self.config.prices
        if prices and not self.usage["uncounted"]:
            total = self.usage["input_tokens"] * prices["input"] + self.usage["output_tokens"] * prices["output"]
            return told | {"cost": total / 1e6, "currency": prices["currency"]}
        return told | {"cost": None}

    def ask(self, count: int, build: Callable[[int], dict[str, Any]]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of `count` requests as they come.

        Args:
          count: of requests.
          build: the request of an index: `messages` and what else it needs. Called when it is sent: pictures are large.

        Raises:
          EndpointError: the endpoint cannot be used, or is down. Failures that led to this are not told as replies.
          Exception: whatever `build` raises.
        """
        held: list[tuple[int, Reply]] = []
        for index, reply in self._replies(count, build):
            if reply.status not in ANSWERS:
                held.append((index, reply))
                if len(held) >= self.config.max_failures:
                    raise self._down(held)
                continue
            self._answered = True
            # The endpoint is alive: what failed before this failed on its own account.
            yield from held
            held = []
            yield index, reply
        if held and not self._answered:
            raise self._down(held)
        yield from held

    def _down(self, held: list[tuple[int, Reply]]) -> EndpointError:
        last = held[-1][1]
        return EndpointError(
            f"{self._where()} failed {len(held)} times in a row, with {self.config.retries} retries where they may help (last: "
            f"{last.status}, {last.text}); answers so far are kept, run again when this is mended"
        )

    def _where(self) -> str:
        return f"endpoint {self.config.base_url or 'api.openai.com'}, model {self.config.model!r}"

    def _replies(self, count: int, build: Callable[[int], dict[str, Any]]) -> Iterator[tuple[int, Reply]]:
        """The same from an event loop in a thread of its own: callers may have a loop themselves, as notebooks do."""
        results: queue.SimpleQueue = queue.SimpleQueue()
        loop = asyncio.new_event_loop()

        async def work() -> None:
            try:
                await self._work(count, build, results.put)
            except BaseExceptionGroup as group:  # of the workers; the first tells why the others were stopped
                results.put(group.exceptions[0])
            except Exception as error:
                results.put(error)
            finally:
                results.put(None)

        task = loop.create_task(work())
        thread = threading.Thread(target=_run, args=(loop, task), daemon=True)
        thread.start()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _work(self, count: int, build: Callable[[int], dict[str, Any]], put: Callable[[Any], None]) -> None:
        indices = iter(range(count))
        # Retries are ours: the library's know no deadline for the body, and no body that is no completion.
        options: dict[str, Any] = {"base_url": self.config.base_url} if self.config.base_url else {}
        client = openai.AsyncOpenAI(api_key=self._key or "none", max_retries=0, **options)

        async def worker() -> None:
            for index in indices:
                put((index, await self._one(client, build(index), file)))

        with contextlib.nullcontext() if self._folder is None else Store.open(self._folder, REPLIES) as file:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, count)):
                    group.create_task(worker())

    async def _one(self, client: openai.AsyncOpenAI, request: Mapping[str, Any], file: Store | None) -> Reply:
        body = {"model": self.config.model, **self.config.parameters, **request}
        key = hashlib.sha256(json.dumps([self.config.base_url, body], sort_keys=True).encode()).hexdigest()
        if key in self._known:
            self.usage["reused"] += 1
            return self._known[key]
        for attempt in range(self.config.retries + 1):
            reply, wait = await self._attempt(client, body)
            if reply.status not in AGAIN:
                break
            if attempt < self.config.retries:
                backoff = self.config.backoff * 2**attempt * random.uniform(0.75, 1.25)
                await asyncio.sleep(min(MAX_WAIT, backoff if wait is None else wait))
        self._count(reply)
        if reply.status in ANSWERS:
            self._known[key] = reply
            if file is not None:
                file.append({"key": key, **dataclasses.asdict(reply)})
        return reply

    async def _attempt(self, client: openai.AsyncOpenAI, body: Mapping[str, Any]) -> tuple[Reply, float | None]:
        """One try, and the seconds that the server asks to wait before the next."""
        await self._pace()
        self.usage["requests"] += 1
        try:
            async with asyncio.timeout(self.config.timeout):
                return self._read(await _body(client, body)), None
        except (TimeoutError, openai.APITimeoutError):
            return Reply(ReplyStatus.TIMEOUT, f"no whole reply within {self.config.timeout:g} s"), None
        except openai.APIStatusError as error:
            return self._status(error), self._hold(error)
        except ValueError as error:
            return Reply(ReplyStatus.GARBAGE, self._clean(str(error))), None
        except (openai.APIConnectionError, OSError, httpx2.HTTPError) as error:
            return Reply(ReplyStatus.UNREACHABLE, self._clean(f"{type(error).__name__}: {error}")), None

    async def _pace(self) -> None:
        """Waits for a place in time: our own limit, and the pause that a busy server asked for."""
        now = time.monotonic()
        start = max(now, self._slot)
        self._slot = start + (60 / self.config.requests_per_minute if self.config.requests_per_minute else 0.0)
        await asyncio.sleep(start - now)

    def _hold(self, error: openai.APIStatusError) -> float | None:
        """The server's Retry-After; where it is about too many requests, the others wait, too."""
        wait = _retry_after(error.response.headers.get("retry-after"))
        if wait is not None and error.status_code == 429:
            self._slot = max(self._slot, time.monotonic() + wait)
        return wait

    def _status(self, error: openai.APIStatusError) -> Reply:
        """What a status other than 200 means for this request.

        Raises:
          EndpointError: for every request.
        """
        code, text = str(error.code or ""), self._clean(f"{error.status_code}: {error.message}")
        if error.status_code in (401, 403, 404) or code == "insufficient_quota":
            known = "is set" if self._key else "is not set"
            raise EndpointError(
                f"{self._where()} cannot be used ({text}); check address, model, quota and the key in "
                f"{self.config.key_variable}, which {known}"
            ) from None
        if error.status_code == 400 and code in ("content_filter", "content_policy_violation"):
            return Reply(ReplyStatus.FILTERED, text)
        if error.status_code == 429:
            return Reply(ReplyStatus.BUSY, text)
        if error.status_code >= 500:
            return Reply(ReplyStatus.SERVER_ERROR, text)
        again = error.status_code in (408, 409)
        return Reply(ReplyStatus.TIMEOUT if again else ReplyStatus.REJECTED, text)

    def _read(self, body: bytes) -> Reply:
        """A completion.

        Raises:
          ValueError: it is none.
        """
        data = json.loads(body)
        try:
            choice = data["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            raise ValueError("the reply is JSON, but no chat completion") from None
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        told = (_tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens")), str(data.get("model")))
        if reason == "content_filter":
            return Reply(ReplyStatus.FILTERED, "a content filter stopped the reply", *told)
        if refusal:
            return Reply(ReplyStatus.REFUSED, self._clean(str(refusal)), *told)
        if reason == "length":
            return Reply(ReplyStatus.CUT, "the reply reached its token limit; raise max_tokens", *told)
        if not isinstance(content, str):
            raise ValueError("the reply has no text")
        return Reply(ReplyStatus.OK, content.replace(self._key, "[key]") if self._key else content, *told)

    def _count(self, reply: Reply) -> None:
        self.usage[reply.status] += 1
        self.usage["input_tokens"] += reply.input_tokens or 0
        self.usage["output_tokens"] += reply.output_tokens or 0
        if reply.status in ANSWERS and (reply.input_tokens is None or reply.output_tokens is None):
            self.usage["uncounted"] += 1

    def _clean(self, text: str) -> str:
        """One short line of what a server said, without our key, which some repeat."""
        text = " ".join(text.split())
        return (text.replace(self._key, "[key]") if self._key else text)[:300]


async def _body(client: openai.AsyncOpenAI, body: Mapping[str, Any]) -> bytes:
    """The bytes of a reply; ValueError where there are too many of them."""
    data = b""
    async with client.chat.completions.with_streaming_response.create(**body) as response:
        async for part in response.iter_bytes():
            data += part
            if len(data) > MAX_BODY:
                raise ValueError(f"the reply is longer than {MAX_BODY} bytes")
    return data


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, given as a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, min(MAX_WAIT, float(header)))
    except ValueError:
        pass
    try:
        return max(0.0, min(MAX_WAIT, email.utils.parsedate_to_datetime(header).timestamp() - time.time()))
    except (TypeError, ValueError):
        return None


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _from_line(line: Mapping[str, Any]) -> Reply:
    values = {field.name: line[field.name] for field in dataclasses.fields(Reply)}
    return Reply(**values | {"status": ReplyStatus(values["status"])})


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
