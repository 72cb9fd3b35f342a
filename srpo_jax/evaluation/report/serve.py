"""The report on loopback, with a place to save human labels; nothing else is served, and nobody else is answered."""

from __future__ import annotations

import hmac
import http.server
import json
from collections.abc import Callable
from typing import Any

LONGEST = 64 << 20
"""Bytes of labels that are read."""


class LabelServer(http.server.ThreadingHTTPServer):
    """Serves `page` at / and passes what is posted to /labels, parsed as JSON, to `save`.

    It listens on 127.0.0.1 and answers requests for that name and port alone (another site's name may be made to resolve
    there), and saves only what brings the token that the page knows.

    Args:
      page: the HTML text.
      token: see `page.render_page`.
      save: raises a ValueError for what is no labels; its message goes back to the page.
      port: 0 takes a free one.

    Raises:
      OSError: the port is taken.
    """

    def __init__(self, page: str, token: str, save: Callable[[Any], None], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.page, self.token, self.save = page.encode(), token.encode(), save


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LabelServer
    server_version, sys_version = "srpo_jax", ""

    def do_GET(self) -> None:
        if not self._known():
            return
        if self.path == "/":
            self._reply(200, self.server.page, "text/html; charset=utf-8")
        else:
            self._reply(404, b"there is one page, at /")

    def do_POST(self) -> None:
        if not self._known():
            return
        given, length = self.headers.get("X-Token", ""), self.headers.get("Content-Length", "")
        if self.path != "/labels" or not hmac.compare_digest(given.encode(), self.server.token):
            self._reply(403, b"not from this page")
        elif not length.isdecimal() or int(length) > LONGEST:
            self._reply(413, b"no length, or too long")
        else:
            try:
                self.server.save(json.loads(self.rfile.read(int(length))))
            except ValueError as error:
                self._reply(400, str(error).encode())
            else:
                self._reply(204)

    def _known(self) -> bool:
        port = self.server.server_address[1]
        if self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return True
        self._reply(421, b"this server answers on 127.0.0.1 alone")
        return False

    def _reply(self, status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the page is the interface."""
