"""Reading a user's copy of a benchmark: tables of several formats, pictures, checksums, and errors that name the place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from srpo_jax.data import images, loaders, rows
from srpo_jax.data.images import ImageError

SHOWN = 5
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class BenchmarkError(ValueError):
    """A benchmark that cannot be evaluated as it lies there."""


class Row:
    """A record of a table, read by published field names.

    Attributes:
      place: file and record, for messages.
    """

    def __init__(self, values: Mapping[str, Any], place: str, source: Source):
        self._values, self.place, self._source = values, place, source

    def __getitem__(self, field: str) -> Any:
        """The value of a field; BenchmarkError where it is missing or empty."""
        value = self.get(field)
        if value is None or value == "":
            name = self._source.fields.get(field, field)
            what = "is empty" if name in self._values else f"is missing; there are {', '.join(map(str, self._values))}"
            raise BenchmarkError(
                f"{self.place}, field {name!r}: {what}; repair the record, or name the field with "
                f"--fields={self._source.name}.{field}=NAME"
            )
        return value

    def get(self, field: str) -> Any:
        """The value of a field that may be missing."""
        return self._values.get(self._source.fields.get(field, field))

    def text(self, field: str) -> str:
        """A field that must be text (a number is written out)."""
        value = self[field]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BenchmarkError(f"{self.place}, field {field!r}: must be text, not {type(value).__name__}")
        return str(value).strip()

    def choice(self, field: str, allowed: Mapping[str, Any]) -> Any:
        """What `allowed` gives for a field's text."""
        value = self.text(field)
        if value not in allowed:
            raise BenchmarkError(f"{self.place}, field {field!r}: {value!r} is none of {', '.join(map(repr, allowed))}")
        return allowed[value]

    def meta(self, split: str, *fields: str) -> dict[str, Any]:
        """`Item.meta`: the subset, and fields that a judge may quote."""
        return {"split": split} | {field: self.get(field) for field in fields}


class Source:
    """The folder of one benchmark.

    Attributes:
      folder: where it lies.
      name: of the benchmark.
      fields: published field name to that of this copy.
      hub: data set on the Hugging Face hub (or a local copy of its repository) to read instead of the folder; "" for none.
      digests: SHA-256 of every annotation file read so far.
      missing: pictures that are not there.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        fields: Mapping[str, str],
        *,
        partial: bool = False,
        where: str = "",
        hub: str = "",
    ):
        self.folder, self.name, self.fields, self.hub = folder, name, fields, hub
        self._partial, self._where = partial, where
        self.digests: dict[str, str] = {}
        self.missing: list[str] = []

    def text(self, file: str) -> str:
        """A UTF-8 file's text; its checksum is kept."""
        return self._bytes(file).decode("utf-8-sig")

    def rows(self, file: str) -> Iterator[Row]:
        """The records of a table: `.csv`, `.jsonl`, `.parquet`, or `.json` holding a list or an object of records.

        In a `.json` object the key of a record is its field "(key)".

        Raises:
          BenchmarkError: the file is missing or broken, or holds something else.
        """
        try:
            values = list(self._values(file))
        except (ValueError, csv.Error) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
            raise self._broken(file, error) from error
        return self.as_rows(file, values)

    def json(self, file: str) -> Any:
        """A JSON file's value.

        Raises:
          BenchmarkError: the file is missing or broken.
        """
        try:
            return json.loads(self.text(file))
        except ValueError as error:
            raise self._broken(file, error) from error

    def as_rows(self, part: str, values: Iterable[Any]) -> Iterator[Row]:
        """Records found in `part` of the folder; BenchmarkError for one that is no object."""
        for number, value in enumerate(values, 1):
            place = f"{self.folder / part}, record {number}"
            if not isinstance(value, Mapping):
                raise BenchmarkError(f"{place}: an object is expected, not {type(value).__name__}")
            yield Row(value, place, self)

    def _broken(self, file: str, error: Exception) -> BenchmarkError:
        if isinstance(error, BenchmarkError):
            return error
        return BenchmarkError(f"{self.folder / file}: cannot be read ({error}); restore the file")

    def _values(self, file: str) -> Iterator[Any]:
        if file.endswith(".parquet"):
            self._bytes(file)
            yield from _undecoded(datasets.Dataset.from_parquet(str(self.folder / file)))
        elif file.endswith(".csv"):
            yield from csv.DictReader(io.StringIO(self.text(file), newline=""))
        elif file.endswith(".jsonl"):
            yield from (json.loads(line) for line in self.text(file).splitlines() if line.strip())
        else:
            found = json.loads(self.text(file))
            yield from [{"(key)": k, **v} for k, v in found.items()] if isinstance(found, dict) else found

    def hub_rows(self, file: str, config: str, split: str) -> Iterator[Row]:
        """The records of the local `file`, or of `split` of a data set on the hub where that is wanted (`hub`).

        Raises:
          BenchmarkError: see `rows`.
        """
        if not self.hub:
            yield from self.rows(file)
            return
        table = datasets.load_dataset(self.hub, config, split=split)
        self.digests[f"{self.hub} {config} {split}"] = table._fingerprint
        for number, value in enumerate(_undecoded(table), 1):
            yield Row(value, f"{self.hub} {config} {split}, record {number}", self)

    def _bytes(self, file: str) -> bytes:
        path = self.folder / file
        if not path.is_file():
            raise BenchmarkError(f"{path}: no such file. {self._where}")
        content = path.read_bytes()
        self.digests[file] = hashlib.sha256(content).hexdigest()
        return content

    def images(self, place: str, *names: str, folder: str = ".") -> tuple[Path, ...] | None:
        """Pictures of the benchmark's folder; a name without extension stands for any usual one.

        Returns:
          The files, or None where one is missing: the item is to be left out. `check_missing` then refuses the copy,
          unless a partial one is wanted.

        Raises:
          BenchmarkError: a name that leads out of the folder.
        """
        found = []
        for name in names:
            exact = self.folder / folder / name
            tries = (
                [exact] if exact.suffix.lower() in EXTENSIONS else [exact.with_name(exact.name + e) for e in EXTENSIONS]
            )
            file = next((path for path in tries if path.is_file()), None)
            if file is None:
                self.missing.append(f"{folder}/{name}".removeprefix("./"))
                return None
            if not file.resolve().is_relative_to(self.folder.resolve()):
                raise BenchmarkError(f"{place}: picture {name!r} leaves {self.folder}; move the file into it")
            found.append(file)
        return tuple(found)

    def embedded(self, row: Row, field: str) -> tuple[Path, ...]:
        """A picture that a Parquet table holds, written once to the cache of pictures."""
        try:
            return (images.embedded_image(loaders.image_cache(), row[field]),)
        except ImageError as error:
            raise BenchmarkError(f"{row.place}, field {field!r}: {error}") from error

    def check_missing(self) -> None:
        """Raises BenchmarkError where pictures are missing and the copy is to be complete."""
        if self.missing and not self._partial:
            shown = ", ".join(self.missing[:SHOWN]) + (", ..." if len(self.missing) > SHOWN else "")
            raise BenchmarkError(
                f"{self.folder}: {len(self.missing)} pictures are missing: {shown}. {self._where}; or pass --partial to leave "
                "their items out (the result says so)"
            )


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    for column, feature in table.features.items():
        table = rows.undecoded(table, column, feature)
    return table
