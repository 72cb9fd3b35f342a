"""Reviews SSUI records in a browser, and exports what people kept.

python scripts/review.py --data=DIR/candidates.jsonl --folder=REVIEW --reviewer=anna [--reviewer=boris] [--adjudicator=chris]
python scripts/review.py --data=DIR/candidates.jsonl --folder=REVIEW --export=REVIEWED

The first command prints a link for each person and serves the page on loopback until Ctrl-C; everything is on the disk before
the page says "saved", so the same command goes on wherever it was ended. The second writes records.jsonl with images, the audit
trail and a summary to the new folder REVIEWED. docs/data.md tells the rules.
"""

import json
import socket
from pathlib import Path

import uvicorn
from absl import flags

from srpo_jax import cli
from srpo_jax.data.apart import join_apart
from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.review.export import CARD, export
from srpo_jax.data.review.server import Links, build_app, check_names
from srpo_jax.data.review.session import Review

DATA = flags.DEFINE_string("data", None, "JSON lines of records.", required=True)
IMAGES = flags.DEFINE_string("images", None, "What image names are relative to; default: the folder of --data.")
FOLDER = flags.DEFINE_string("folder", None, "Where the review's log is kept.", required=True)
REVIEWER = flags.DEFINE_multi_string("reviewer", [], "Name of a reviewer; give several for several people.")
ADJUDICATOR = flags.DEFINE_multi_string("adjudicator", [], "Name of who decides where two reviewers differ.")
TWICE = flags.DEFINE_bool("twice", False, "Every record takes two reviewers, not only those of contested categories.")
UNSAFE = flags.DEFINE_string(
    "unsafe_replies",
    None,
    "File of unsafe replies that were kept apart: hidden until somebody opens one, exported to a file of their own.",
)
EXPORT = flags.DEFINE_string(
    "export", None, "Write the reviewed data set to this new folder instead of serving the page."
)
PORT = flags.DEFINE_integer("port", 8707, "Of the page, on 127.0.0.1; 0 takes a free one.")


def main(_):
    if not EXPORT.value:
        check_names(REVIEWER.value, ADJUDICATOR.value)
    records = load_jsonl(DATA.value, IMAGES.value)
    records, apart = join_apart(records, UNSAFE.value) if UNSAFE.value else (records, ())
    review = Review(records, FOLDER.value, adjudicators=ADJUDICATOR.value, twice=TWICE.value, apart=apart)
    if review.outdated:
        print(f"{review.outdated} decisions were about other versions of their records and do not count")
    if EXPORT.value:
        card = Path(DATA.value).with_name(CARD)
        print(json.dumps(export(review, FOLDER.value, EXPORT.value, card), indent=2))
    else:
        serve(review)


def serve(review):
    """Until interrupted."""
    people = [*REVIEWER.value, *ADJUDICATOR.value]
    links = Links(FOLDER.value)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", PORT.value))
        except OSError as error:
            raise SystemExit(
                f"port {PORT.value} cannot be had ({error.strerror}); choose another with --port"
            ) from None
        listening.listen()  # who opens a link at once has to wait, and is not refused
        port = listening.getsockname()[1]
        for name in people:
            print(f"{name}: {links.url(name, port)}")
        print("Ctrl-C ends it; the links stay the same", flush=True)
        config = uvicorn.Config(build_app(review, links, people, port), log_level="error", server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    cli.run(main)
