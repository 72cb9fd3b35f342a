"""Builds candidate SSUI records from a folder of pictures; run it again after a kill and it goes on.

python scripts/build_ssui.py --images=photos --manifest=photos/manifest.jsonl --output=data/mine --agents=agents.json \
    --name="My kitchen hazards" --contact=data@example.org [--images_may_leave]

The manifest has one JSON object per line: {"image": "a.jpg", "licence": "CC-BY-4.0", "source": "...", "description": "..."}.
--agents is MODEL@URL, or a JSON file with settings per role (docs/data.md). What comes out are candidates: people review
them next.
"""

from pathlib import Path
from typing import Any

from absl import flags

from srpo_jax import cli
from srpo_jax.data.builder import BuildConfig, IntakeConfig, build, read_agents, read_manifest, render
from srpo_jax.data.builder.guards import load_hook
from srpo_jax.data.privacy import count_faces

IMAGES = flags.DEFINE_string("images", None, "Folder of pictures.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
AGENTS = flags.DEFINE_string("agents", None, "MODEL@URL, or a JSON file.", required=True)
NAME = flags.DEFINE_string("name", None, "Of the data set, for its card.", required=True)
CONTACT = flags.DEFINE_string("contact", None, "Where people ask for a removal; stands in the card.", required=True)
MANIFEST = flags.DEFINE_string("manifest", None, "JSON lines with licence, source and description of each picture.")
LICENCE = flags.DEFINE_string("licence", "", "Of every picture of which the manifest tells none.")
SOURCE = flags.DEFINE_string("source", "", "The same for where it comes from.")
REMOVED = flags.DEFINE_string("removed", None, "SHA-256 of pictures that must not come back, one per line.")
QUERIES = flags.DEFINE_integer("queries", 2, "Risky requests per picture, at most.")
TRIES = flags.DEFINE_integer("tries", 3, "Of a question whose answers cannot be used.")
REVISIONS = flags.DEFINE_integer("revisions", 1, "Of a path that reflection sends back.")
TWINS = flags.DEFINE_bool("twins", True, "Write a harmless twin of each risky record.")
IMAGE_ONLY = flags.DEFINE_bool("image_only", True, "Have each picture judged alone.")
IMAGE_MODERATOR = flags.DEFINE_enum("image_moderator", "model", ["model", "none"], "Who looks at pictures first.")
MODERATOR = flags.DEFINE_string(
    "moderator", None, "package.module:function, a moderator of yours for pictures and texts."
)
FACES = flags.DEFINE_string("faces", "opencv", "Who counts faces: opencv, none, or package.module:function.")
UNSAFE = flags.DEFINE_enum("unsafe_replies", "limited", ["limited", "omit", "apart"], "What becomes of unsafe replies.")
SIMILARITY = flags.DEFINE_float("similarity", 90.0, "Of two questions (0 to 100) that repeat each other.")
REPEATS = flags.DEFINE_integer(
    "repeats", 1, "Questions that may repeat each other on unrelated pictures; 0: any number."
)
TEST = flags.DEFINE_float("test_share", 0.1, "Share of records in the split `test`.", 0, 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the splits.")
SYNTHETIC = flags.DEFINE_bool("synthetic", False, "Pictures or agents are made up for a test; every record says so.")
LEAVE = flags.DEFINE_bool("images_may_leave", False, "Pictures may be sent to another machine.")


def local_agent(values: dict[str, Any]) -> Any:
    """An agent in this process; loaded only where one is asked for."""
    from srpo_jax.exploration.agent import LocalAgent, LocalSettings

    return LocalAgent(LocalSettings.of(values))


def main(_):
    shares = {"train": 1 - TEST.value} | ({"test": TEST.value} if TEST.value else {})
    removed = frozenset(Path(REMOVED.value).read_text(encoding="utf-8").split()) if REMOVED.value else frozenset()
    config = BuildConfig(
        NAME.value,
        CONTACT.value,
        IntakeConfig(LICENCE.value, SOURCE.value, removed=removed),
        queries=QUERIES.value,
        revisions=REVISIONS.value,
        tries=TRIES.value,
        image_only=IMAGE_ONLY.value,
        twins=TWINS.value,
        image_moderator=IMAGE_MODERATOR.value,
        unsafe_replies=UNSAFE.value,
        similarity=SIMILARITY.value,
        repeats=REPEATS.value or None,
        splits=shares,
        seed=SEED.value,
        synthetic=SYNTHETIC.value,
        images_may_leave=LEAVE.value,
    )
    if FACES.value in ("opencv", "none"):
        faces = count_faces if FACES.value == "opencv" else None
    else:
        faces = load_hook(FACES.value, "faces")
    hook = load_hook(MODERATOR.value) if MODERATOR.value else None
    built = build(
        IMAGES.value,
        OUTPUT.value,
        read_agents(AGENTS.value, local_agent),
        config,
        manifest=read_manifest(MANIFEST.value),
        hook=hook,
        faces=faces,
    )
    cli.say(render(built.rows))
    aside = f"{len(built.aside)} set aside (set_aside.jsonl)"
    cli.say(
        f"{len(built.records)} candidates in {Path(OUTPUT.value) / 'records.jsonl'}, {aside}; people review them next"
    )


if __name__ == "__main__":
    cli.run(main)
