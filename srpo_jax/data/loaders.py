"""Reading SSUI records: JSON lines with a folder of images, or a Hugging Face data set.

The canonical form is one JSON object per line (docs/data.md has an example):

    field         type                         required
    id            string                       no: file name and line number
    images        list of file names           yes; [] for a question without a picture
    question      string                       yes
    risky         true or false                no: true if there is a category
    category      one of the nine, or null     on risky records
    steps         six strings, or six {"title": …, "text": …}, or one string with the headings "Step 1: Analyze Visual
                  Context" and so on           yes
    safe_reply    string                       yes
    unsafe_reply  string or null               no
    twin          id of a record, or null      no
    meta          object                       no: everything else goes here

File names are relative to the image folder and must stay inside it. The published names (image, Question, Unsafe
Category, Safe Reply, Unsafe Reply, Explainable Reasoning; in snake case, too) are understood for the same fields.

Every fault of every record is collected, and one `LoadError` reports them together.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import datasets
import PIL.Image
from absl import logging

from srpo_jax.data.images import (
    MAX_PIXELS,
    ImageError,
    decoded_image,
    embedded_image,
    image_in,
    open_image,
)
from srpo_jax.data.records import CATEGORIES, Record, RecordError
from srpo_jax.data.rows import Row, Rows, Table, cache_folder, open_rows
from srpo_jax.data.sft import SftRecord
from srpo_jax.paths import STEP_TITLES, Grammar, Status, parse

T = TypeVar("T", bound=Record | SftRecord)
FindImage = Callable[[Any], Path | PIL.Image.Image]
FIELDS = tuple(field.name for field in dataclasses.fields(Record))
SFT_FIELDS = tuple(field.name for field in dataclasses.fields(SftRecord))
ALIASES = {
    "image": "images",
    "unsafe_category": "category",
    "explainable_reasoning": "steps",
}
SHOWN = 20
"""How many faults a `LoadError` lists."""


class LoadError(ValueError):
    """Faults in a data set.

    Attributes:
      problems: one line per fault: place, record, field, what is wrong and what to do.
    """

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} fault" + ("s" if len(problems) > 1 else "")
        super().__init__("\n  ".join([f"{source}: {count}", *problems[:SHOWN], *more]))


class Records(Sequence[T]):
    """Records of a data set by index, read and built when asked for, so that its size takes no memory.

    A slice is another such sequence. It may be sent to other processes.

    Attributes:
      name: of the data set, for messages.
      places: where records stand among all rows; None for all of them.
      max_broken: how many records who reads them may pass over.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        build: Callable[[Row], T],
        places: Sequence[int] | None = None,
        max_broken: int = 0,
    ):
        self.name, self.places, self.max_broken, self._rows, self._build = name, places, max_broken, rows, build

    def __len__(self) -> int:
        return len(self._rows if self.places is None else self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Records[T]: ...
    def __getitem__(self, index):
        """Record `index`; LoadError with place, record, field and remedy of its faults."""
        if isinstance(index, slice):
            places = range(len(self._rows)) if self.places is None else self.places
            return Records(self.name, self._rows, self._build, places[index], self.max_broken)
        return self.built(self.row(index))

    def row(self, index: int) -> Row:
        """The raw row of record `index`."""
        return self._rows[index if self.places is None else self.places[index]]

    def __iter__(self) -> Iterator[T]:
        return map(self.built, self.rows())

    def rows(self) -> Iterator[Row]:
        """The raw rows in order."""
        return iter(self._rows) if self.places is None else (self._rows[i] for i in self.places)

    def built(self, row: Row) -> T:
        """The record of a row; LoadError names its faults."""
        if row.fault is not None:
            raise LoadError(self.name, [f"{row.place}: {row.fault}"])
        try:
            return self._build(row)
        except RecordError as error:
            name = row.values.get("id", row.default_id) if isinstance(row.values, Mapping) else row.default_id
            problems = [f"{row.place}, record {name!r}, field {field!r}: {what}" for field, what in error.problems]
            raise LoadError(self.name, problems) from error


def open_records(
    source: str | Path,
    form: str,
    split: str = "train",
    *,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    schema: str = "ssui",
    max_broken: int = 0,
) -> Records[Any]:
    """The records of a data set by index; nothing is checked before it is read (`load_records` checks all).

    Args:
      source: a file, a folder, or with "datasets" the id of a data set on the hub.
      form: one of `rows.FORMATS`.
      split: where the source has several.
      revision: of a hub data set; name one for results that others can repeat.
      image_folder: what image names are relative to (by default a file's own folder), and where embedded images are written
        under names made from their content; if None, those stay in memory with their record.
      schema: "ssui" for `Record`, "sft" for `SftRecord`.
      max_broken: how many broken records may be passed over, named in the log.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: an unknown format or schema, a missing split, or a file that is not of this format.
    """
    if schema not in BUILDERS:
        raise ValueError(f"unknown schema {schema!r}: use one of {', '.join(BUILDERS)}")
    rows = open_rows(source, form, split, revision)
    find_image: FindImage = decoded_image
    if form in ("jsonl", "json"):
        find_image = partial(image_in, Path(source).parent if image_folder is None else Path(image_folder))
    elif image_folder is not None:
        find_image = partial(embedded_image, Path(image_folder))
    return Records(str(source), rows, partial(BUILDERS[schema], find_image), max_broken=max_broken)


def load_jsonl(
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    check_images: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[Record]:
    """Reads records from JSON lines; images are not opened unless `check_images`.

    Args:
      path: a UTF-8 file; blank lines are passed over.
      image_folder: what image names are relative to; the file's own folder if None.
      check_images: whether to decode every image once now, so that a broken one is reported before hours of work.
      max_pixels: for `check_images`.

    Raises:
      FileNotFoundError: if there is no such file.
      LoadError: naming line, record, field and remedy of every fault.
    """
    return load_records(open_records(path, "jsonl", image_folder=image_folder), check_images, max_pixels)


def load_hf(
    source: str | Path | datasets.Dataset,
    split: str = "train",
    *,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    check_images: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[Record]:
    """Reads records from a Hugging Face data set.

    Args:
      source: a `datasets.Dataset`, a folder written by `save_to_disk`, a Parquet file, or what `datasets.load_dataset`
        takes: a folder of data files or the id of a data set on the hub. No data set's own code is run.
      split: which split, where the source has several.
      revision: of a hub data set; name one for results that others can repeat.
      image_folder: embedded images are written here once, under names made from their content, so that records stay
        small; images given as file names must lie here. `$XDG_CACHE_HOME/srpo_jax/images` if None.
      check_images: see `load_jsonl`.
      max_pixels: for `check_images`.

    Raises:
      FileNotFoundError: if a path does not exist.
      LoadError: naming row, record, field and remedy of every fault.
      ValueError: if the source lacks the split.
    """
    folder = image_cache() if image_folder is None else Path(image_folder)
    if isinstance(source, datasets.Dataset):
        records = Records("data set", Table(source, "data set"), partial(_build, partial(embedded_image, folder)))
    else:
        records = open_records(source, "datasets", split, revision=revision, image_folder=folder)
    return load_records(records, check_images, max_pixels)


def image_cache() -> Path:
    """Where embedded pictures are kept by default."""
    return cache_folder() / "images"


def load_records(source: Records[T], check_images: bool = False, max_pixels: int = MAX_PIXELS) -> list[T]:
    """All records of a source, checked together: ids differ, twins exist and are of the other kind.

    Args:
      source: from `open_records`; `max_broken` of its rows may be broken, and are left out.
      check_images: whether to decode every image once.
      max_pixels: for `check_images`.

    Raises:
      LoadError: more broken rows (naming place, record, field and remedy of every fault), or no record.
    """
    records: list[T] = []
    places: dict[str, str] = {}
    problems: list[list[str]] = []
    for row in source.rows():
        try:
            record = source.built(row)
            _check_images(record, row.place, source.name, max_pixels if check_images else None)
        except LoadError as error:
            problems.append(error.problems)
            continue
        if record.id in places:
            what = f"{places[record.id]} has the same id; give every record its own"
            problems.append([f"{row.place}, record {record.id!r}, field 'id': {what}"])
            continue
        places[record.id] = row.place
        records.append(record)
    # A twin can only be judged missing when every record was understood.
    problems += [] if problems else [[line] for line in _twin_problems(records, places)]
    if len(problems) > source.max_broken:
        raise LoadError(source.name, [line for lines in problems for line in lines])
    for lines in problems:
        logging.warning("%s: left out: %s", source.name, "; ".join(lines))
    if not records:
        raise LoadError(source.name, ["holds no record"])
    return records


def _twin_problems(records: list[Any], places: Mapping[str, str]) -> Iterator[str]:
    by_id = {record.id: record for record in records if isinstance(record, Record)}
    for record in by_id.values():
        if record.twin is None:
            continue
        where = f"{places[record.id]}, record {record.id!r}, field 'twin'"
        if record.twin not in by_id:
            yield f"{where}: there is no record {record.twin!r}; add it or use null"
        elif by_id[record.twin].risky == record.risky:
            yield f"{where}: {record.twin!r} is as {'risky' if record.risky else 'harmless'} as this record"


def _check_images(record: Any, place: str, source: str, max_pixels: int | None) -> None:
    if max_pixels is None:
        return
    problems = []
    for image in record.images:
        try:
            open_image(image, max_pixels=max_pixels)
        except ImageError as error:
            problems.append(f"{place}, record {record.id!r}, field 'images': {error}")
    if problems:
        raise LoadError(source, problems)


def _build(find_image: FindImage, row: Row) -> Record:
    if not isinstance(row.values, Mapping):
        what = f"a record is an object with the fields {', '.join(FIELDS)}, not {type(row.values).__name__}"
        raise RecordError(row.default_id, [("(all)", what)])
    values, problems = _canonical_names(row.values, FIELDS, ALIASES)
    for field in ("images", "question", "steps", "safe_reply"):
        if values.get(field) is None:
            problems.append((field, "is missing" + ("; write [] for a text-only question" * (field == "images"))))
    if values.get("risky") is None:
        if "category" not in values:
            problems.append(("risky", "is missing; give a category, or false on a harmless record"))
        values["risky"] = values.get("category") is not None
    category = values.get("category")
    if isinstance(category, str) and (guess := _category_guess(category)):
        problems.append(("category", f"{category!r} is unknown; did you mean {guess!r}?"))
    if problems:
        raise RecordError(row.default_id, problems)
    problems, images = _images(values["images"], find_image)
    more, steps = _steps(values["steps"])
    if problems or more:
        raise RecordError(row.default_id, problems + more)
    texts = {f: _stripped(values.get(f)) for f in ("question", "safe_reply", "unsafe_reply", "twin")}
    return Record(
        id=row.default_id if values.get("id") is None else values["id"],
        images=images,
        risky=values["risky"],
        category=category,
        steps=steps,
        meta={} if values.get("meta") is None else values["meta"],
        **texts,
    )


def _build_sft(find_image: FindImage, row: Row) -> SftRecord:
    if not isinstance(row.values, Mapping):
        what = f"a record is an object with the fields {', '.join(SFT_FIELDS)}, not {type(row.values).__name__}"
        raise RecordError(row.default_id, [("(all)", what)])
    values, problems = _canonical_names(row.values, SFT_FIELDS, {"image": "images"})
    for field in ("images", "question", "answer"):
        if values.get(field) is None:
            problems.append((field, "is missing" + ("; write [] for a text-only question" * (field == "images"))))
    if problems:
        raise RecordError(row.default_id, problems)
    problems, images = _images(values.pop("images"), find_image)
    if problems:
        raise RecordError(row.default_id, problems)
    given = {field: _stripped(value) for field, value in values.items() if value is not None}
    return SftRecord(**{"id": row.default_id, "images": images, **given})


BUILDERS: dict[str, Callable[[FindImage, Row], Any]] = {"ssui": _build, "sft": _build_sft}
"""How a record of each schema is made from a row."""


def _canonical_names(
    raw: Mapping[str, Any], fields: Sequence[str], aliases: Mapping[str, str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    values: dict[str, Any] = {}
    problems = []
    for key, value in raw.items():
        name = key.strip().lower().replace(" ", "_")
        name = aliases.get(name, name)
        if name not in fields:
            close = difflib.get_close_matches(name, [*fields, *aliases], 1)
            hint = f"did you mean {close[0]!r}? Else " if close else ""
            problems.append((key, f'unknown field; {hint}move it under "meta" or remove it'))
        elif name in values:
            problems.append((key, f"gives {name!r} a second time; keep one"))
        else:
            values[name] = value
    return values, problems


def _category_guess(category: str) -> str | None:
    if category in CATEGORIES:
        return None
    by_lower = {name.lower(): name for name in CATEGORIES}
    close = difflib.get_close_matches(category.strip().lower(), by_lower, 1)
    return by_lower[close[0]] if close else None


def _images(value: Any, find_image: FindImage) -> tuple[list[tuple[str, str]], tuple[Any, ...]]:
    found, problems = [], []
    for item in value if isinstance(value, list) else [value]:
        try:
            found.append(find_image(item))
        except ImageError as error:
            problems.append(("images", str(error)))
    return problems, tuple(found)


def _steps(value: Any) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """The six bodies, from strings, titled objects or one text with headings."""
    if isinstance(value, str):
        grammar = Grammar()
        parsed = parse(f"{grammar.opening}{value}\n{grammar.closing}-", stopped=True)
        if parsed.status is Status.MULTIPLE:
            return [("steps", f"contains {grammar.opening_tag} or {grammar.closing_tag}; remove them")], ()
        problems = [("steps", f"{what}; expected {_expected()}") for what in parsed.deviations()]
        return problems, tuple(step.text for step in parsed.steps)
    if not isinstance(value, list):
        return [("steps", f"must be a list of six steps or one text with headings, not {type(value).__name__}")], ()
    problems, bodies = [], []
    for number, step in enumerate(value, 1):
        if isinstance(step, Mapping):
            if set(step) != {"title", "text"} or not isinstance(step["text"], str):
                problems.append(("steps", f'step {number} must hold the strings "title" and "text" and nothing else'))
                continue
            title = STEP_TITLES[number - 1] if number <= len(STEP_TITLES) else None
            if step["title"] != title:
                problems.append(("steps", f"step {number} is titled {step['title']!r}; expected {_expected()}"))
            step = step["text"]
        bodies.append(_stripped(step))
    return problems, tuple(bodies)


def _expected() -> str:
    return ", ".join(f"{number} {title}" for number, title in enumerate(STEP_TITLES, 1))


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value
