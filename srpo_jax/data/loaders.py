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
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from srpo_jax.data.images import FORMATS, MAX_PIXELS, ImageError, open_image
from srpo_jax.data.records import CATEGORIES, Record, RecordError
from srpo_jax.paths import STEP_TITLES, Grammar, Status, parse

FIELDS = tuple(field.name for field in dataclasses.fields(Record))
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


@dataclasses.dataclass(frozen=True)
class _Row:
    """One raw record and where it stands."""

    place: str
    default_id: str
    values: Any
    fault: str | None = None  # Why there are no values.


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
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    rows = _json_rows(path)
    return _collect(str(path), rows, lambda value: _image_in(folder, value), max_pixels if check_images else None)


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
    name = "data set" if isinstance(source, datasets.Dataset) else str(source)
    dataset = source if isinstance(source, datasets.Dataset) else _open_hf(source, split, revision)
    for column, feature in dataset.features.items():
        dataset = undecoded(dataset, column, feature)
    folder = image_cache() if image_folder is None else Path(image_folder)
    rows = (_Row(f"row {index}", f"{Path(name).stem}:{index}", row) for index, row in enumerate(dataset))
    return _collect(name, rows, lambda value: embedded_image(folder, value), max_pixels if check_images else None)


def image_cache() -> Path:
    """Where embedded pictures are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo_jax" / "images"


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


def _json_rows(path: Path) -> Iterator[_Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place, default_id = f"line {number}", f"{path.stem}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                yield _Row(place, default_id, None, f"not valid JSON: {error}; write one object per line")
            else:
                yield _Row(place, default_id, values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"a field is given twice among {', '.join(keys)}")
    return dict(pairs)


def _collect(
    source: str, rows: Iterable[_Row], find_image: Callable[[Any], Path], max_pixels: int | None
) -> list[Record]:
    """Builds all records; raises one `LoadError` for the faults of all of them."""
    records: list[Record] = []
    places: dict[str, str] = {}
    problems: list[str] = []
    for row in rows:
        if row.fault is not None:
            problems.append(f"{row.place}: {row.fault}")
            continue
        try:
            record = _build(row, find_image)
            _check_images(record, max_pixels)
        except RecordError as error:
            name = row.values.get("id", row.default_id) if isinstance(row.values, Mapping) else row.default_id
            problems += [f"{row.place}, record {name!r}, field {field!r}: {what}" for field, what in error.problems]
            continue
        if record.id in places:
            what = f"{places[record.id]} has the same id; give every record its own"
            problems.append(f"{row.place}, record {record.id!r}, field 'id': {what}")
        places.setdefault(record.id, row.place)
        records.append(record)
    # A twin can only be judged missing when every record was understood.
    problems += [] if problems else _twin_problems(records, places)
    if problems:
        raise LoadError(source, problems)
    if not records:
        raise LoadError(source, ["holds no record"])
    return records


def _twin_problems(records: list[Record], places: Mapping[str, str]) -> Iterator[str]:
    by_id = {record.id: record for record in records}
    for record in records:
        if record.twin is None:
            continue
        where = f"{places[record.id]}, record {record.id!r}, field 'twin'"
        if record.twin not in by_id:
            yield f"{where}: there is no record {record.twin!r}; add it or use null"
        elif by_id[record.twin].risky == record.risky:
            yield f"{where}: {record.twin!r} is as {'risky' if record.risky else 'harmless'} as this record"


def _check_images(record: Record, max_pixels: int | None) -> None:
    if max_pixels is None:
        return
    problems = []
    for image in record.images:
        try:
            open_image(image, max_pixels=max_pixels)
        except ImageError as error:
            problems.append(("images", str(error)))
    if problems:
        raise RecordError(record.id, problems)


def _build(row: _Row, find_image: Callable[[Any], Path]) -> Record:
    if not isinstance(row.values, Mapping):
        what = f"a record is an object with the fields {', '.join(FIELDS)}, not {type(row.values).__name__}"
        raise RecordError(row.default_id, [("(all)", what)])
    values, problems = _canonical_names(row.values)
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


def _canonical_names(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    values: dict[str, Any] = {}
    problems = []
    for key, value in raw.items():
        name = key.strip().lower().replace(" ", "_")
        name = ALIASES.get(name, name)
        if name not in FIELDS:
            close = difflib.get_close_matches(name, [*FIELDS, *ALIASES], 1)
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


def _images(value: Any, find_image: Callable[[Any], Path]) -> tuple[list[tuple[str, str]], tuple[Path, ...]]:
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


def _image_in(folder: Path, name: Any) -> Path:
    """The file `name` of the folder; ImageError if it is missing or lies elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ImageError(f"{name!r} is no file name; give a name relative to the image folder {folder}")
    root = folder.resolve()
    # resolve() follows links, so one that leads out of the folder is seen, too.
    file = (root / name).resolve()
    if Path(name).is_absolute() or not file.is_relative_to(root):
        raise ImageError(f"{name!r} leaves the image folder {folder}; move the file into it and give its name there")
    if not file.is_file():
        raise ImageError(f"{name!r} is not a file in the image folder {folder}; add it or correct the name")
    return file


def embedded_image(folder: Path, value: Any) -> Path:
    """Writes an embedded image to the folder, unless it is there, and returns the file."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if content is None and isinstance(value, Mapping):
        content = value.get("path")
    if isinstance(content, str):
        return _image_in(folder, content)
    if not isinstance(content, bytes):
        raise ImageError(f"a {type(content).__name__} is no image; embed the bytes of one of {', '.join(FORMATS)}")
    file = folder / hashlib.sha256(content).hexdigest()
    if not file.is_file() or file.stat().st_size != len(content):
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may do the same at once: each renames its own whole copy.
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)
    return file
