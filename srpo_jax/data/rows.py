"""Raw rows of a data set by index, whatever file they lie in; nothing is read before it is asked for.

JSON lines, one JSON array, what Hugging Face `datasets` opens, or ArrayRecord shards as `tensorflow-datasets` lays them out.
A row is the object as it stands in the file. Sources may be sent to other processes: each opens the files anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np

FORMATS = ("jsonl", "json", "datasets", "arrayrecord")
_CHUNK = 1 << 24
_LARGE = 1 << 26
"""Bytes from which on an index is worth a file of its own."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One raw record and where it stands.

    Attributes:
      place: for messages, such as "line 3".
      default_id: of a record that has no id of its own.
      values: the object; anything that JSON knows, images as names or `{"bytes": …}`.
      fault: why there are no values; None if there are.
    """

    place: str
    default_id: str
    values: Any
    fault: str | None = None


class Rows(Sequence[Row]):
    """Rows by index; a slice is a list."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(int(index) % len(self))

    def row(self, index: int) -> Row:
        """Row `index`, 0 <= index < len(self)."""
        raise NotImplementedError


class JsonLines(Rows):
    """JSON lines by index; blank lines are passed over.

    The offsets of all lines are found once (8 or 16 bytes a line). Those of a large file are kept in the cache folder, from
    where every process maps them; a file of another size or time is indexed anew.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._index = _line_index(self.path)
        self._open()

    def _open(self) -> None:
        self._file = open(self.path, "rb")  # noqa: SIM115  # open as long as the rows are
        index = np.load(self._index, mmap_mode="r") if isinstance(self._index, Path) else self._index
        self._offsets, self._numbers = index[0], (index[1] if len(index) > 1 else None)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Row:
        start = int(self._offsets[index])
        stop = int(self._offsets[index + 1]) if index + 1 < len(self) else self._size
        number = index + 1 if self._numbers is None else int(self._numbers[index])
        # Unlike seek and read, this is safe in several threads.
        return _json_row(self.path, number, os.pread(self._file.fileno(), stop - start, start))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_index": self._index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class JsonArray(Rows):
    """A JSON file that is one array; read as a whole."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            values = json.loads(self.path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(values, list):
            raise ValueError(f"{path}: an array of records is expected, not {type(values).__name__}; see docs/data.md")
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def row(self, index: int) -> Row:
        return Row(f"item {index}", f"{self.path.stem}:{index}", self._values[index])


class Table(Rows):
    """A Hugging Face data set; `meta` may be JSON text, because a column cannot hold objects of differing fields."""

    def __init__(self, dataset: datasets.Dataset, name: str):
        for column, feature in dataset.features.items():
            dataset = undecoded(dataset, column, feature)
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Row]:
        return (self._named(index, row) for index, row in enumerate(self._dataset))

    def row(self, index: int) -> Row:
        return self._named(index, self._dataset[index])

    def _named(self, index: int, values: dict[str, Any]) -> Row:
        place, default_id = f"row {index}", f"{self._name}:{index}"
        if isinstance(values.get("meta"), str):
            try:
                values = values | {"meta": json.loads(values["meta"])}
            except (ValueError, RecursionError) as error:
                return Row(place, default_id, None, f"field 'meta' is no JSON: {error}")
        return Row(place, default_id, values)


class ArrayRecords(Rows):
    """ArrayRecord shards of a data set as `tensorflow-datasets` describes it; TensorFlow is not imported.

    A row has the features `record`, the fields as JSON text, and `images`, the encoded pictures.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self._open()

    def _open(self) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"{self.folder}: ArrayRecord files need tensorflow-datasets; pip install 'srpo_jax[tfds]'"
            ) from error
        if not (self.folder / "dataset_info.json").is_file():
            raise FileNotFoundError(f"{self.folder}: no dataset_info.json; name the folder that holds the shards")
        builder = tfds.builder_from_directory(str(self.folder))
        if self.split not in builder.info.splits:
            raise ValueError(f"{self.folder} has no split {self.split!r}; it has {', '.join(builder.info.splits)}")
        if {"record", "images"} - set(builder.info.features or ()):
            raise ValueError(
                f"{self.folder}: the features record and images are expected; convert it (scripts/convert_data.py)"
            )
        self._source = builder.as_data_source(self.split)

    def __len__(self) -> int:
        return len(self._source)

    def row(self, index: int) -> Row:
        place, default_id = f"row {index}", f"{self.folder.name}:{index}"
        found = self._source[index]
        try:
            values = json.loads(bytes(found["record"]).decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            return Row(place, default_id, None, f"not valid JSON: {error}")
        return Row(place, default_id, values | {"images": [{"bytes": bytes(image)} for image in found["images"]]})

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def guess_format(source: str | Path) -> str:
    """The format of a source, by its name and what lies there; anything unknown is for `datasets`."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return path.suffix[1:]
    return "arrayrecord" if (path / "features.json").is_file() else "datasets"


def open_rows(source: str | Path, form: str, split: str = "train", revision: str | None = None) -> Rows:
    """The rows of a data set.

    Args:
      source: a file, a folder, or with "datasets" the id of a data set on the hub.
      form: one of `FORMATS`.
      split: where the source has several.
      revision: of a hub data set.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: an unknown format, a missing split, or a file that is not of this format.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}: use one of {', '.join(FORMATS)}")
    if form == "jsonl":
        return JsonLines(source)
    if form == "json":
        return JsonArray(source)
    if form == "arrayrecord":
        return ArrayRecords(source, split)
    return Table(_open_hf(source, split, revision), Path(source).stem)


def _json_row(path: Path, number: int, line: bytes) -> Row:
    place, default_id = f"line {number}", f"{path.stem}:{number}"
    try:
        return Row(place, default_id, json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique))
    except (ValueError, RecursionError) as error:
        return Row(place, default_id, None, f"not valid JSON: {error}; write one object per line")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"a field is given twice among {', '.join(keys)}")
    return dict(pairs)


def cache_folder() -> Path:
    """Where what can be made again is kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo_jax"


def _line_index(path: Path) -> np.ndarray | Path:
    """int64[1 or 2, lines], offsets and, where the file has blank lines, line numbers; or the file that holds them."""
    stat = path.stat()
    if stat.st_size < _LARGE:
        return _find_lines(path)
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()
    file = cache_folder() / "lines" / f"{hashlib.sha256(key).hexdigest()[:32]}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        np.save(partial, _find_lines(path))
        partial.replace(file)
    return file


def _find_lines(path: Path) -> np.ndarray:
    starts, at, begins = [np.zeros(0, np.int64)], 0, True
    unlike: list[int] = []  # lines that do not begin as an object does: only they can be blank
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            read = np.frombuffer(chunk, np.uint8)
            here = np.flatnonzero(np.concatenate([[begins], read[:-1] == ord("\n")]))
            unlike += (at + here[read[here] != ord("{")]).tolist()
            starts.append(at + here)
            at, begins = at + len(chunk), chunk.endswith(b"\n")
        blank = [start for start in unlike if file.seek(start) >= 0 and not file.readline().strip()]
    offsets = np.concatenate(starts)
    if not blank:
        return offsets[None]
    return np.stack([offsets, np.arange(1, len(offsets) + 1)])[:, ~np.isin(offsets, blank)]


def _open_hf(source: str | Path, split: str, revision: str | None) -> datasets.Dataset:
    path = Path(source)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return datasets.Dataset.from_parquet(str(path))
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return datasets.load_dataset(str(source), split=split, revision=revision)
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        return found[split]
    return found


def undecoded(dataset: datasets.Dataset, column: str, feature: Any) -> datasets.Dataset:
    """Images as bytes (decoding is `open_image`'s business), class labels as their names."""
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        return dataset.cast_column(column, datasets.Value("int64")).map(
            lambda row: {column: None if row[column] is None else names[row[column]]},
            features=datasets.Features({**dataset.features, column: datasets.Value("string")}),
        )
    return dataset
