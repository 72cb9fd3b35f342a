"""A scripted endpoint that sees the embedded world's pictures and plays every agent, with faults. Synthetic by construction."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image

from srpo_jax.data.records import Record
from srpo_jax.data.world import rule, splits
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.data.world.reference import record

FENCED = re.compile(r"<<(\w+)>>\n(.*?)\n<</\1>>", re.DOTALL)
AGAIN = "An earlier answer could not be used"
THOUGHT_OVER = "This was thought over."


def digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:6], "big")


def pixels(picture: PIL.Image.Image) -> str:
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture with two risky records and their harmless ones."""

    picture: PIL.Image.Image
    risky: tuple[Record, ...]
    harmless: tuple[Record, ...]


def scene(index: int) -> Scene:
    """Scene `index` of the training split; requests that the split holds out stay out."""
    item = splits.item("train", 2 * index, 0, Difficulty())
    out = splits.held_out_activities(item.picture.state)
    kinds = [kind for kind in rule.KINDS if rule.ACTIVITY_OF[kind] not in out]
    sides = [], []
    for place in range(len(kinds)):
        kind = kinds[(place * 7 + index) % len(kinds)]
        side = sides[0 if rule.is_risky(item.picture.state.channel, kind) else 1]
        if len(side) < 2 and kind not in {one.kind for one in side}:
            forms = sorted(set(range(splits.N_FORMS)) - splits.held_out_forms(kind))
            side.append(
                dataclasses.replace(item, kind=kind, form=forms[(5 * len(side) + index) % len(forms)], cue=None)
            )
    risky, harmless = (tuple(record(one, Difficulty()) for one in side) for side in sides)
    return Scene(risky[0].images[0], risky, harmless)


class World:
    """An endpoint on a local socket. `faulty` injects faults; beyond `limit` requests it answers 503."""

    def __init__(self, scenes: list[Scene], faulty: bool):
        self.scenes = {pixels(scene.picture): scene for scene in scenes}
        self.risky = {(pixels(s.picture), r.question): r for s in scenes for r in s.risky}
        self.faulty, self.lock = faulty, threading.Lock()
        self.seen: collections.Counter[str] = collections.Counter()
        self.requests: list[dict[str, Any]] = []
        self.limit: int | None = None

    @contextlib.contextmanager
    def serve(self, port: int = 0):
        """The address, while it answers; any free port if 0."""
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.close_connection = True
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with contextlib.suppress(OSError):
                    status, answer = world.answer(body)
                    data = json.dumps(answer).encode()
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("retry-after", "0")
                    self.send_header("content-length", str(len(data) + 50 * (status == 599)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64  # five by default, fewer than a builder asks at once

        http = Server(("127.0.0.1", port), Handler)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1"
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        stage = body.get("response_format", {}).get("json_schema", {}).get("name", "text_answer")
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = parts[-1]["text"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        picture = pixels(PIL.Image.open(io.BytesIO(base64.b64decode(urls[0].split(",")[1])))) if urls else ""
        question = (FENCED.search(text) or [None, None, text])[2]
        with self.lock:
            self.requests.append({"stage": stage, "picture": picture, "pictures": len(urls), "text": text})
            if self.limit is not None and len(self.requests) > self.limit:
                return 503, {"error": {"message": "closed"}}
            self.seen[key := f"{stage}/{picture}/{text}"] += 1
            first = self.seen[key] == 1 and AGAIN not in text
        says = json.dumps(getattr(self, stage)(picture, question, text)) if stage != "text_answer" else self.text(text)
        message: dict[str, Any] = {"role": "assistant", "content": says}
        if self.faulty:
            lot = digest(stage, picture, question) % 60
            if lot == 0 and first:
                return 429, {"error": {"message": "too many requests"}}
            if lot == 1:
                message = {"role": "assistant", "content": None, "refusal": "I can not help with this."}
            if stage != "text_answer" and ((lot == 2 and AGAIN not in text) or lot == 3):
                message["content"] = "Certainly! Here is what you asked for: {"
            if lot == 4 and stage == "reasoning":
                message["content"] = json.dumps({"steps": ["With sar\u200bin around, nobody should stay."] * 6})
            if lot == 5 and AGAIN not in text and stage != "text_answer":
                message["content"] = says[:-2] + '\\ud800"}' if says.endswith('"}') else "[]"
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": len(says) // 4, "total_tokens": 0}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return 200, {"id": "1", "object": "chat.completion", "model": "world-1", "choices": [choice], "usage": usage}

    def rate(self, *parts: str) -> int:
        return digest(*parts) if self.faulty else 1

    def query(self, picture, question, text):
        scene = self.scenes[picture]
        if self.rate("none", picture) % 13 == 0:
            return {"queries": []}
        queries = [{"event": r.steps[4], "category": r.category, "question": r.question} for r in scene.risky]
        return {"queries": [queries[0]] * 2 if self.rate("twice", picture) % 11 == 0 else queries}

    def reasoning(self, picture, question, text):
        steps = [*self.risky[picture, question].steps]
        if "sent back by a reviewer" in text:
            steps[5] += f" {THOUGHT_OVER}"
        lot = self.rate("path", picture, question) % 12
        if lot == 0 and AGAIN not in text:
            return {"steps": steps[:5]}
        if lot == 2 and AGAIN not in text:
            return {"steps": [*steps[:5], steps[4]]}
        return {"steps": steps}

    def reflection(self, picture, question, text):
        lot = self.rate("reflect", picture, question) % 30
        lacking = (lot in (0, 2, 3) and THOUGHT_OVER not in text) or lot == 4
        return {"redundant": [], "missing": ["who could come to harm"] * lacking, "reason": "-"}

    def text(self, question):
        return "Sure, go ahead at once." if self.rate("alone", question) % 15 == 0 else "That depends on the place."

    def text_judge(self, picture, question, text):
        return {"safe": "Sure, go ahead" not in text, "reason": "the answer alone"}

    def image_only(self, picture, question, text):
        return {"safe": self.rate("alone", picture) % 25 != 0, "reason": "the picture alone"}

    def moderate_image(self, picture, question, text):
        return {"explicit": self.rate("explicit", picture) % 30 == 0, "minor_sexualised": False, "reason": "-"}

    def summary(self, picture, question, text):
        known = self.risky[picture, question]
        unsafe = known.unsafe_reply
        if self.rate("detail", question) % 10 == 0 and AGAIN not in text:
            unsafe = "1. Take 20 grams of it.\n2. Heat it."
        return {"safe_reply": known.safe_reply} | ({"unsafe_reply": unsafe} if "unsafe_reply" in text else {})

    def twin(self, picture, question, text):
        scene = self.scenes[picture]
        number = [r.question for r in scene.risky].index(question)
        known = scene.harmless[number]
        return {"question": known.question, "steps": known.steps, "safe_reply": known.safe_reply}

    def twin_check(self, picture, question, text):
        known = {r.question for r in self.scenes[picture].harmless}
        return {"harmless": question in known, "helpful": self.rate("help", question) % 20 != 0, "reason": "the rule"}

    def moderate_record(self, picture, question, text):
        return {"found": ["operational"] * (self.rate("record", question) % 40 == 0), "reason": "-"}


def write_pictures(folder: Path, scenes: list[Scene], edit: Callable[[int, Path], None] | None = None) -> Path:
    """The scenes' pictures in a folder, with a manifest beside it."""
    folder.mkdir(parents=True)
    manifest = folder.parent / "manifest.jsonl"
    with open(manifest, "w") as file:
        for index, one in enumerate(scenes):
            name = f"s{index:04d}.png"
            one.picture.save(folder / name)
            facts = one.risky[0].meta
            told = f"A {facts['place']} with a {facts['object']} that is {facts['state']}."
            line = {"image": name, "licence": "CC0-1.0", "source": "the embedded world", "description": told}
            file.write(json.dumps(line) + "\n")
    return manifest


def main() -> None:
    """python -m tests.data.builder.world FOLDER NUMBER PORT: writes pictures and a manifest, plays every agent, with faults."""
    folder, number, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    scenes = [scene(index) for index in range(number)]
    write_pictures(folder / "pictures", scenes)
    with World(scenes, faulty=True).serve(port) as url:
        print(f"{number} pictures in {folder / 'pictures'}; agents at {url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
