"""Converts a data set from one format or layout to another; run again after a kill, it goes on. Uploads a reviewed one.

    python scripts/convert_data.py --source=data.jsonl --to=arrayrecord --out=data-ar
    python scripts/convert_data.py --source=train_data.json --layout=think-in-safety --images=. --to=jsonl --out=tis
    python scripts/convert_data.py --source=reviewed/data.jsonl --to=parquet --out=ssui --push=owner/name

Records are those of `srpo_jax.data`; docs/data.md tells formats and layouts, and what each layout lacks. A push is private,
asks, and takes reviewed records alone.
"""

import shutil
from functools import partial
from pathlib import Path

from absl import flags
from tqdm import tqdm

from srpo_jax import cli
from srpo_jax.data.converters import LAYOUTS, convert_row
from srpo_jax.data.formats import PARTS, WRITERS, convert
from srpo_jax.data.loaders import LoadError, Records, open_records
from srpo_jax.data.publish import CARD, publish
from srpo_jax.data.rows import FORMATS, Row, guess_format

SOURCE = flags.DEFINE_string("source", None, "File, folder, or id of a data set on the hub.", required=True)
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Of the source; default: by its name.")
SPLIT = flags.DEFINE_string("split", "train", "Of the source, where it has several.")
REVISION = flags.DEFINE_string("revision", None, "Of a data set on the hub.")
IMAGES = flags.DEFINE_string("images", None, "Folder that image names are relative to; default: that of the file.")
LAYOUT = flags.DEFINE_enum("layout", "ssui", ["ssui", "sft", *LAYOUTS], "Whose fields the source has.")
TO = flags.DEFINE_enum("to", None, list(WRITERS), "Format to write.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
SHARD = flags.DEFINE_integer("shard", 2048, "Rows of the source per shard; one shard is held in memory.", lower_bound=1)
MAX_BROKEN = flags.DEFINE_integer(
    "max_broken", 0, "Rows that may be broken; they are left out and named.", lower_bound=0
)
PUSH = flags.DEFINE_string("push", None, "Upload the result to this private data set of the hub, after asking.")


def read_layout(records: Records, layout: str, index: int) -> list:
    """The records of row `index` of a published layout."""
    row = records.row(index)
    if row.fault is not None:
        raise LoadError(records.name, [f"{row.place}: {row.fault}"])
    try:
        fields = convert_row(layout, row.values, row.default_id)
    except ValueError as error:
        raise LoadError(records.name, [f"{row.place}: {error}"]) from error
    return [records.built(Row(row.place, row.default_id, one)) for one in fields]


def main(_):
    form = FORMAT.value or guess_format(SOURCE.value)
    schema = "ssui" if LAYOUT.value == "ssui" else "sft"
    # Embedded pictures pass through files, because one that was decoded would be encoded anew.
    images = IMAGES.value or (None if form in ("jsonl", "json") else Path(OUT.value, PARTS, "images"))
    records = open_records(SOURCE.value, form, SPLIT.value, revision=REVISION.value, image_folder=images, schema=schema)
    read = (lambda i: [records[i]]) if LAYOUT.value == schema else partial(read_layout, records, LAYOUT.value)
    report = convert(
        len(records),
        read,
        TO.value,
        OUT.value,
        schema=schema,
        origin={flag.name: flag.value for flag in (SOURCE, LAYOUT, SPLIT, REVISION, IMAGES)} | {"format": form},
        shard=SHARD.value,
        max_broken=MAX_BROKEN.value,
        progress=partial(tqdm, desc="convert", unit="shard"),
    )
    cli.say(f"{OUT.value}: {report['records']} records, {report['broken']} rows left out")
    card = Path(SOURCE.value).parent / CARD
    if card.is_file() and not Path(OUT.value, CARD).exists():  # a data set takes its card with it
        shutil.copyfile(card, Path(OUT.value, CARD))
    if LAYOUT.value in LAYOUTS:
        layout = LAYOUTS[LAYOUT.value]
        cli.say(f"{layout.source}{'' if layout.verified else ' (unverified)'}; missing: {'; '.join(layout.missing)}")
    if PUSH.value:
        from huggingface_hub import HfApi

        written = Path(OUT.value, "data.jsonl" if TO.value == "jsonl" else "")
        form = "datasets" if TO.value == "parquet" else TO.value
        count = publish(open_records(written, form, schema=schema), OUT.value, PUSH.value, HfApi())
        cli.say(f"uploaded {count} records to {PUSH.value}")


if __name__ == "__main__":
    cli.run(main)
