"""The review page on loopback: nobody but the holders of its links is answered, and nothing hostile in a record runs.

Each person has a link with a token of their own, which becomes a cookie of their folder (`/name/`), so that two people may use
one browser. A write needs, beyond the cookie, a token that only the page knows. Requests are answered only under the server's
own name and port, so that no other site can be made to resolve here. The content security policy allows the page's own script
and style sheet; pictures are decoded here and sent as new files.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from srpo_jax.data.images import ImageError, open_image
from srpo_jax.data.records import CATEGORIES, RecordError
from srpo_jax.data.review.agreement import agreement
from srpo_jax.data.review.decisions import STEPS
from srpo_jax.data.review.session import Review, ReviewError, StaleError, TakenError
from srpo_jax.paths import STEP_TITLES

HERE = Path(__file__).parent
LARGEST_REQUEST = 8 << 20
"""Bytes of a write."""
WIDEST = 1600
"""Pixels of a picture's longer side, as shown."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STATIC = {"page.js": "text/javascript", "page.css": "text/css"}


class Links:
    """Tokens of the people who review in a folder: random, and the same whenever the server is started again.

    Args:
      folder: holds the secret they are made from, readable by its owner alone.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / ".secret"
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(file, "w") as out:
                out.write(secrets.token_hex(32))
        self._secret = path.read_bytes()
        if len(self._secret) < 64:
            raise ValueError(f"{path} is damaged; remove it, and everybody gets a new link")

    def token(self, name: str, purpose: str) -> str:
        """For the purposes "link" and "write"."""
        return hmac.new(self._secret, f"{purpose} {name}".encode(), hashlib.sha256).hexdigest()

    def url(self, name: str, port: int) -> str:
        """Where `name` reviews."""
        return f"http://127.0.0.1:{port}/{name}/?token={self.token(name, 'link')}"


def check_names(reviewers: Sequence[str], adjudicators: Sequence[str]) -> None:
    """Raises a ValueError unless all are different words that can stand in an address."""
    names = [*reviewers, *adjudicators]
    if not reviewers:
        raise ValueError("name at least one reviewer")
    if bad := [name for name in names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name)]:
        raise ValueError(f"reviewer {bad[0]!r}: a name is up to 32 letters, digits, - and _")
    if len(set(names)) < len(names):
        raise ValueError(f"names must differ, and who adjudicates does not review: {', '.join(names)}")


def build_app(review: Review, links: Links, reviewers: Sequence[str], port: int) -> Starlette:
    """The application.

    Args:
      review: what is reviewed.
      links: of the people.
      reviewers: their names, adjudicators too.
      port: where it is served; requests for another are refused.
    """
    app = Starlette(
        routes=[
            Route("/{name}/", _page),
            Route("/{name}/{file}", _static),
            Route("/{name}/api/rows", _rows),
            Route("/{name}/api/records/{index:int}", _read),
            Route("/{name}/api/records/{index:int}", _write, methods=["POST"]),
            Route("/{name}/images/{index:int}/{number:int}", _image),
        ],
        middleware=[Middleware(_Guard, port=port)],
        exception_handlers={HTTPException: _refused},
    )
    app.state.review, app.state.links, app.state.names = review, links, frozenset(reviewers)
    return app


class _Guard:
    """Refuses requests under a foreign name or from a foreign page, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, port: int):
        self.app, self.hosts = app, (f"127.0.0.1:{port}", f"localhost:{port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        request = Request(scope)
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in self.hosts:
            await Response("this server answers on 127.0.0.1 alone", 421)(scope, receive, send_guarded)
        elif origin is not None and origin != f"http://{host}":
            await Response("not from this page", 403)(scope, receive, send_guarded)
        else:
            await self.app(scope, receive, send_guarded)


def _who(request: Request) -> str:
    """The person whose cookie this is; 403 if it is nobody's."""
    name = request.path_params["name"]
    known = name if name in request.app.state.names else ""  # an unknown name takes as long as a known one
    told = request.cookies.get("review", "").encode()
    if not hmac.compare_digest(told, request.app.state.links.token(known, "link").encode()) or not known:
        raise HTTPException(403, "open the link that scripts/review.py printed for you")
    return name


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code)


async def _page(request: Request) -> Response:
    """The page; with a token in the address, its cookie first, and an address without it."""
    token, name = request.query_params.get("token"), request.path_params["name"]
    if token is not None and hmac.compare_digest(token.encode(), request.app.state.links.token(name, "link").encode()):
        response = RedirectResponse(request.url.path, 303)
        response.set_cookie("review", token, path=request.url.path, httponly=True, samesite="strict")
        return response
    name = _who(request)
    text = (HERE / "page.html").read_text(encoding="utf-8")
    return Response(text.replace("WRITE-TOKEN", request.app.state.links.token(name, "write")), media_type="text/html")


async def _static(request: Request) -> Response:
    _who(request)
    file = request.path_params["file"]
    if file not in STATIC:
        raise HTTPException(404, "no such file")
    return Response((HERE / file).read_bytes(), media_type=STATIC[file])


async def _rows(request: Request) -> Response:
    """What there is to review."""
    name, review = _who(request), request.app.state.review
    labels = ["Category", "Question", *(f"Step {i}: {title}" for i, title in enumerate(STEP_TITLES, 1))]
    names = ["category", "question", *STEPS, "safe_reply", "unsafe_reply"]
    told = {
        "reviewer": name,
        "role": review.role(name),
        "categories": CATEGORIES,
        "labels": dict(zip(names, [*labels, "Safe reply", "Unsafe reply"], strict=True)),
        "outdated": review.outdated,
    }
    if told["role"] == "adjudicator":
        told["agreement"] = agreement(review)
    return _json(told | await run_in_threadpool(_news, review, name, -1))


async def _read(request: Request) -> Response:
    name, review = _who(request), request.app.state.review
    return _json({"view": review.view(_index(request), name)})


async def _write(request: Request) -> Response:
    name, review, index = _who(request), request.app.state.review, _index(request)
    token = request.headers.get("x-review", "").encode()
    if not hmac.compare_digest(token, request.app.state.links.token(name, "write").encode()):
        raise HTTPException(403, "not from this page")
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > LARGEST_REQUEST:
        raise HTTPException(413, f"no length, or more than {LARGEST_REQUEST >> 20} MB")
    try:
        body = json.loads(await request.body())
        told = {"action": str(body["action"]), "version": int(body["version"]), "edits": body.get("edits")}
        told["note"], since = str(body.get("note", "")), int(body["since"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HTTPException(400, f"no write: {error!r}") from None
    status, failed = await run_in_threadpool(_try, review, index, name, told)
    return _json(failed | {"view": review.view(index, name)} | _news(review, name, since), status)


def _try(review: Review, index: int, name: str, told: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Writes; the HTTP status and what the page has to show of a refusal."""
    try:
        review.act(index, name, **told)
    except RecordError as error:
        return 422, {"error": "the record cannot be accepted like this", "problems": error.problems}
    except (StaleError, TakenError) as error:
        return 409, {"error": str(error)}
    except ReviewError as error:
        return 400, {"error": str(error)}
    return 200, {}


def _news(review: Review, name: str, since: int) -> dict[str, Any]:
    place = review.place  # read first: a row that changes meanwhile comes again
    return {"rows": review.rows(name, since), "seen": place}


async def _image(request: Request) -> Response:
    _who(request)
    images = request.app.state.review.records[_index(request)].images
    number = request.path_params["number"]
    if number >= len(images):
        raise HTTPException(404, "no such image")
    try:
        return Response(await run_in_threadpool(_shown, images[number]), media_type="image/webp")
    except ImageError as error:
        raise HTTPException(422, str(error)) from None


def _shown(path: Path) -> bytes:
    """The picture decoded and written anew, so that only pixels reach the browser."""
    image = open_image(path)
    small = image.width * image.height <= 512 * 512
    image.thumbnail((WIDEST, WIDEST))
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=small, quality=90)
    return out.getvalue()


def _index(request: Request) -> int:
    index = request.path_params["index"]
    if index >= len(request.app.state.review.records):
        raise HTTPException(404, "no such record")
    return index


def _json(value: Any, status: int = 200) -> Response:
    # ASCII: a record may hold half a surrogate pair, which UTF-8 cannot.
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
