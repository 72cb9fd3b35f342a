"""A stand-in for Google Cloud Storage: as much of its JSON API as tensorstore, gcsfs and Google's client ask for.

Objects, their generations and preconditions, ranges, listing, uploads in one piece and resumable ones, copies, batches.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
COPY = rf"(?:/(?:rewriteTo|copyTo|moveTo)(?:/b/{BUCKET})?/o/([^/]+))?"
OBJECT = rf"/(?:upload/|download/)?(?:storage/v1/)?b/{BUCKET}/o(?:/([^/]+))?{COPY}"


class Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]]
    uploads: dict[str, tuple[str, bytearray]]
    lock: threading.RLock
    counter = 0

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, content: object = None, **headers: object) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers, "Content-Length": len(data)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            if found := re.fullmatch(OBJECT, url.path):
                self.on_object(query, body, *(part and unquote(part) for part in found.groups()))
            elif url.path.startswith("/batch"):
                self.on_batch(body)
            elif re.fullmatch(rf"/(?:storage/v1/)?b/{BUCKET}(?:/storageLayout)?", url.path):
                self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
            else:
                self.answer(404, {"error": {"code": 404, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do

    def on_object(self, query: dict[str, str], body: bytes, name: str | None, target: str | None) -> None:
        if "upload_id" in query:
            self.resume(query["upload_id"], body)
        elif self.command == "POST" and target is None:
            self.upload(query, body)
        elif name is None:
            self.answer(200, self.listing(query))
        elif name not in self.objects:
            self.answer(404, {"error": {"code": 404, "message": f"no such object: {name}"}})
        elif target is not None:
            copy = self.put(target, self.objects[name][1])
            if "/moveTo/" in self.path:
                del self.objects[name]
            self.answer(200, copy if "/moveTo/" in self.path else {"done": True, "resource": copy})
        elif self.refused(name, query):
            self.answer(412, {"error": {"code": 412, "message": "precondition"}})
        elif self.command == "DELETE":
            del self.objects[name]
            self.answer(204)
        elif query.get("alt") == "media":
            self.download(name, query)
        else:
            self.answer(200, self.told(name))

    def refused(self, name: str, query: dict[str, str]) -> bool:
        generation = self.objects.get(name, (0, b""))[0]
        return "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation

    def put(self, name: str, data: bytes) -> dict[str, object]:
        Bucket.counter += 1
        self.objects[name] = 1_700_000_000_000_000 + Bucket.counter, data
        return self.told(name)

    def told(self, name: str) -> dict[str, object]:
        generation, data = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        sizes = {"size": str(len(data)), "generation": str(generation), "metageneration": "1"}
        return {"kind": "storage#object", "name": name, "bucket": BUCKET, "id": name, **sizes, **times}

    def listing(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif "endOffset" not in query or name < query["endOffset"]:
                items.append(self.told(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def download(self, name: str, query: dict[str, str]) -> None:
        generation, data = self.objects[name]
        told = {
            "x-goog-generation": generation,
            "x-goog-metageneration": 1,
            "x-goog-stored-content-encoding": "identity",
        }
        if query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        elif asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else len(data) - int(last)
            stop = int(last) + 1 if first and last else len(data)
            if start >= len(data):
                self.answer(416)
                return
            part = data[start:stop]
            self.answer(206, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(data)}", **told)
        else:
            self.answer(200, data, **told)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        name = query.get("name", "")
        if query["uploadType"] == "multipart":
            mark = b"--" + re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            about, content = (
                part.partition(b"\r\n\r\n")[2] if b"\r\n\r\n" in part else part.partition(b"\n\n")[2]
                for part in body.split(mark)[1:3]
            )
            name = name or json.loads(about)["name"]
            body = re.sub(rb"\r?\n\Z", b"", content)
        if query["uploadType"] == "resumable":
            name = name or json.loads(body)["name"]
            Bucket.counter += 1
            self.uploads[str(Bucket.counter)] = name, bytearray()
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={Bucket.counter}"
            self.answer(200, Location=where)
        elif self.refused(name, query):
            self.answer(412, {"error": {"code": 412, "message": "precondition"}})
        else:
            self.answer(200, self.put(name, body))

    def resume(self, upload: str, body: bytes) -> None:
        name, data = self.uploads[upload]
        data += body
        total = self.headers.get("Content-Range", "*/*").rpartition("/")[2]
        if total == "*" and "Content-Range" in self.headers:
            self.answer(308, **({"Range": f"bytes=0-{len(data) - 1}"} if data else {}))
        else:
            self.answer(200, self.put(name, bytes(data)))

    def on_batch(self, body: bytes) -> None:
        """Deletions, all of which are said to have succeeded."""
        mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+)", body)):
            self.objects.pop(unquote(re.search(r"/o/([^/?]+)", path.decode())[1]), None)
            parts.append(
                f"--{mark}\r\nContent-Type: application/http\r\nContent-ID: <response-{number + 1}>\r\n\r\n"
                "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(parts) + f"--{mark}--\r\n"
        self.answer(200, text.encode(), **{"Content-Type": f"multipart/mixed; boundary={mark}"})


@contextmanager
def serve() -> Iterator[tuple[dict[str, str], dict[str, tuple[int, bytes]]]]:
    """Environment variables under which `gs://bucket` is here, and its objects by name: (generation, bytes)."""
    kind = type("Here", (Bucket,), {"objects": {}, "uploads": {}, "lock": threading.RLock()})
    server = ThreadingHTTPServer(("localhost", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    here = f"http://localhost:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": here,
        "TENSORSTORE_GCS_HTTP_URL": here,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
        "GOOGLE_CLOUD_PROJECT": "here",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google's metadata server who we are
    }
    try:
        yield environment, kind.objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
