"""Writing a data set, shard by shard: JSON lines beside their images, Parquet, or ArrayRecord.

A conversion reads rows in order and holds one shard at a time. A shard appears by one rename, so that the same command, run
again after a kill, goes on after the last whole one. Whatever the format, `loaders.open_records` gives the same records.

    out/  data.jsonl  images/                                      jsonl
          train-00000-of-00003.parquet ...                         parquet; also a folder for `datasets.load_dataset`
          srpo-train.array_record-00000-of-00003 ... *.json        arrayrecord; also for `tfds.builder_from_directory`
          conversion.json                                          what was converted, what was left out and why
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from absl import logging

from srpo_jax.data.images import FORMATS, open_image
from srpo_jax.data.loaders import LoadError
from srpo_jax.data.records import Record
from srpo_jax.data.sft import SftRecord
from srpo_jax.files import write_json

REPORT = "conversion.json"
PARTS = ".parts"
"""Folder of an unfinished conversion, removed at its end."""
AnyRecord = Record | SftRecord


@contextlib.contextmanager
def renamed(file: Path) -> Iterator[Path]:
    """A name to write to; the file appears under its own by one rename, or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


def to_row(record: AnyRecord) -> dict[str, Any]:
    """The record's fields as JSON gives them, images as their encoded bytes; those that say nothing are left out."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if isinstance(record, Record):
        fields["steps"] = list(record.steps)
    fields["images"] = [_encoded(image) for image in record.images]
    fields["meta"] = dict(record.meta) or None
    return {name: value for name, value in fields.items() if value is not None}


def _encoded(image: Path | PIL.Image.Image) -> bytes:
    """A file as it is; a picture in memory as PNG, which loses nothing of its pixels."""
    if isinstance(image, Path):
        open_image(image)  # a broken picture is reported here and not months later
        return image.read_bytes()
    buffer = io.BytesIO()
    open_image(image).save(buffer, "PNG")
    return buffer.getvalue()


def convert(
    count: int,
    read: Callable[[int], Sequence[AnyRecord]],
    to: str,
    out: str | Path,
    *,
    schema: str,
    origin: Mapping[str, Any],
    shard: int = 2048,
    max_broken: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Converts a data set; goes on where a killed conversion ended.

    Args:
      count: rows of the source.
      read: the records of row `i`; raises ValueError, naming place and remedy, where the row is broken.
      to: one of `WRITERS`.
      out: the folder to write; it is empty, new, or holds the same conversion unfinished.
      schema: of the records, "ssui" or "sft".
      origin: what identifies source and options, as JSON values; a folder begun from something else is refused.
      shard: rows of the source per shard. One shard is held in memory.
      max_broken: how many rows may be broken; they are left out and named in `conversion.json`.
      progress: wraps the numbers of the shards to be written.

    Returns:
      The report, as in `conversion.json`: `records` and `broken` (number of rows), `left_out` (one line per fault).

    Raises:
      LoadError: more broken rows than `max_broken`.
      ValueError: the folder holds something else.
    """
    out, total = Path(out), max(1, -(-count // shard))
    plan = {**origin, "schema": schema, "rows": count, "shard": shard, "to": to}
    parts = _open_folder(out, plan)
    if parts is None:
        return json.loads((out / REPORT).read_text(encoding="utf-8"))
    writer, said = WRITERS[to](schema, out, parts, total), [parts / f"{number:05d}.json" for number in range(total)]
    left_out = [line for file in said if file.is_file() for line in _lines(file)]
    for number in progress([n for n in range(total) if not said[n].is_file()]):
        rows, faults = _read(range(number * shard, min(count, (number + 1) * shard)), read)
        left_out += faults
        if len(left_out) > max_broken:
            raise LoadError(str(origin.get("source", "the source")), [line for lines in left_out for line in lines])
        writer.write(rows, number)
        write_json(said[number], {"records": len(rows), "left_out": faults})  # the shard is whole: it counts
    counts = [json.loads(file.read_text(encoding="utf-8"))["records"] for file in said]
    if not sum(counts):
        raise LoadError(str(origin.get("source", "the source")), ["holds no record"])
    writer.finish(counts)
    left_out = [line for file in said for line in _lines(file)]
    for lines in left_out:
        logging.warning("left out: %s", "; ".join(lines))
    report = {**plan, "records": sum(counts), "broken": len(left_out), "left_out": ["; ".join(x) for x in left_out]}
    write_json(out / REPORT, report)
    shutil.rmtree(parts)
    return report


def _open_folder(out: Path, plan: Mapping[str, Any]) -> Path | None:
    """The folder of finished parts; None where the whole conversion is done."""
    parts, report = out / PARTS, out / REPORT
    plan = json.loads(json.dumps(plan))
    begun = report if report.is_file() else parts / "plan.json"
    if begun.is_file():
        found = json.loads(begun.read_text(encoding="utf-8"))
        if differ := [name for name in plan if found.get(name) != plan[name]]:
            told = "; ".join(f"{name} is {plan[name]!r}, there {found.get(name)!r}" for name in differ)
            raise ValueError(f"{out} holds another conversion: {told}; choose another folder")
        return None if begun == report else parts
    if out.is_dir() and any(file.name != PARTS for file in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {REPORT}; choose another folder")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(parts / "plan.json", plan)
    return parts


def _read(numbers: Iterable[int], read: Callable[[int], Sequence[AnyRecord]]) -> tuple[list[dict], list[list[str]]]:
    rows: list[dict[str, Any]] = []
    faults: list[list[str]] = []
    for number in numbers:
        try:
            rows += [to_row(record) for record in read(number)]
        except ValueError as error:
            faults.append(error.problems if isinstance(error, LoadError) else [f"row {number}: {error}"])
    return rows, faults


def _lines(file: Path) -> list[list[str]]:
    return json.loads(file.read_text(encoding="utf-8"))["left_out"]


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes the shards of one conversion, each by `write`, and then what describes them all, by `finish`."""

    schema: str
    out: Path
    parts: Path
    total: int

    def write(self, rows: Sequence[dict[str, Any]], number: int) -> None:
        raise NotImplementedError

    def finish(self, counts: Sequence[int]) -> None:
        """`counts`: records of each shard."""


class _JsonLines(_Writer):
    """`data.jsonl`, and each picture once in `images/`, named after its content."""

    def write(self, rows: Sequence[dict[str, Any]], number: int) -> None:
        folder = self.out / "images"
        folder.mkdir(exist_ok=True)
        with renamed(self.parts / f"{number:05d}.jsonl") as partial, open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                names = [_store(folder, content) for content in row["images"]]
                file.write(json.dumps(row | {"images": names}, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(self, counts: Sequence[int]) -> None:
        with renamed(self.out / "data.jsonl") as partial, open(partial, "wb") as whole:
            for number in range(self.total):
                with open(self.parts / f"{number:05d}.jsonl", "rb") as part:
                    shutil.copyfileobj(part, whole)


class _Parquet(_Writer):
    """Parquet shards with embedded pictures, as the hub and `datasets.load_dataset` read them."""

    def write(self, rows: Sequence[dict[str, Any]], number: int) -> None:
        columns = {name: [row.get(name) for row in rows] for name in COLUMNS[self.schema]}
        columns["images"] = [[{"bytes": content, "path": None} for content in row["images"]] for row in rows]
        columns["meta"] = [json.dumps(meta or {}, ensure_ascii=False, allow_nan=False) for meta in columns["meta"]]
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(COLUMNS[self.schema]))
        with renamed(self.out / f"train-{number:05d}-of-{self.total:05d}.parquet") as partial:
            dataset.to_parquet(str(partial))


class _ArrayRecord(_Writer):
    """ArrayRecord shards and the metadata by which `tensorflow-datasets` finds and decodes them."""

    NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

    def features(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.features.FeaturesDict(
            {"record": tfds.features.Text(), "images": tfds.features.Sequence(tfds.features.Text())}
        )

    def write(self, rows: Sequence[dict[str, Any]], number: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        features = self.features()
        with renamed(self.out / f"srpo-train.array_record-{number:05d}-of-{self.total:05d}") as partial:
            writer = ArrayRecordWriter(str(partial), "group_size:1")  # a group is read and decompressed as a whole
            for row in rows:
                text = json.dumps(row | {"images": []}, ensure_ascii=False, allow_nan=False)
                example = features.encode_example({"record": text, "images": row["images"]})
                writer.write(features.serialize_example(example))
            writer.close()

    def finish(self, counts: Sequence[int]) -> None:
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self.out, template=self.NAME, dataset_name="srpo", split="train", filetype_suffix="array_record"
        )
        size = sum(file.stat().st_size for file in self.out.glob("srpo-train.array_record-*"))
        split = tfds.core.SplitInfo(
            name="train", shard_lengths=list(counts), num_bytes=size, filename_template=template
        )
        tfds.folder_dataset.write_metadata(
            data_dir=str(self.out),
            features=self.features(),
            split_infos=[split],
            filename_template=self.NAME,
            check_data=False,  # it would import TensorFlow
        )


WRITERS: dict[str, type[_Writer]] = {"jsonl": _JsonLines, "parquet": _Parquet, "arrayrecord": _ArrayRecord}
_TEXT, _FLAG = datasets.Value("string"), datasets.Value("bool")
_SHARED = {"id": _TEXT, "images": datasets.List(datasets.Image()), "question": _TEXT, "risky": _FLAG, "category": _TEXT}
COLUMNS = {
    "ssui": _SHARED
    | {"steps": datasets.List(_TEXT)}
    | dict.fromkeys(("safe_reply", "unsafe_reply", "twin", "meta"), _TEXT),
    "sft": _SHARED | dict.fromkeys(("reasoning", "answer", "meta"), _TEXT),
}
"""Columns of Parquet files; `meta` is JSON text, because objects of differing fields make no column."""


def _store(folder: Path, content: bytes) -> str:
    """Writes a picture under the name of its content, unless it is there; returns the name in the data set."""
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
        suffix = (image.format or "image").lower()
    file = folder / f"{hashlib.sha256(content).hexdigest()}.{suffix}"
    if not file.is_file():
        with renamed(file) as partial:
            partial.write_bytes(content)
    return f"images/{file.name}"
