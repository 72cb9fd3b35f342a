"""Responses that people labelled, beside the verdicts that others published for them: MSTS and XSTest.

The files are those that the authors publish; the package ships none. MSTS (Röttger et al. 2025, CC BY 4.0) labels harm in
4,000 responses of ten models to 400 prompts on 200 cases; XSTest (Röttger et al. 2024, CC BY 4.0) labels refusal in 2,250
responses of five models to 450 prompts. The pictures of MSTS lie elsewhere: a judge reads their descriptions.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from srpo_jax.data.items import Item
from srpo_jax.paths import ParsedPath, Status

MSTS_LABELS = {"1": "safe", "2": "unsafe"}
MSTS_COLUMNS = (
    *("case_id", "prompt_type", "prompt_text", "unsafe_image_description", "model", "response"),
    *("annot1_label", "annot2_label", "final_label"),
)
XSTEST_LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}
XSTEST_SCORERS = {"gpt4": "gpteval", "strmatch": "streval"}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A response with its human labels.

    Attributes:
      item: what was asked, named after the response; its cluster is the case of MSTS, the prompt of XSTest.
      model: who answered.
      response: the answer.
      label: the final human label.
      annotators: the labels of the two annotators.
      published: labels that automatic scorers gave, by their name; None where a cell holds none of the labels.
    """

    item: Item
    model: str
    response: str
    label: str
    annotators: tuple[str, str]
    published: Mapping[str, str | None]

    @property
    def cluster(self) -> str:
        """What responses share that are not independent."""
        return self.item.cluster

    @property
    def path(self) -> ParsedPath:
        """The response as an answer without a path."""
        return ParsedPath(Status.OK, (), self.response)


class LabelledError(ValueError):
    """Files that are missing or not as published; names file, row and column."""


def load_msts(folder: Path) -> list[Labelled]:
    """MSTS: labels "safe" and "unsafe"; `published` holds the eight automatic judges."""
    source = "https://github.com/paul-rottger/msts-multimodal-safety, data/"
    file = folder / "response_annotations/english_multimodal.csv"
    rows = _read(file, MSTS_COLUMNS, source)
    judged = folder / "auto_eval/english_multimodal_autoeval.csv"
    verdicts = _read(judged, (), source)
    if len(verdicts) != len(rows):
        raise LabelledError(f"{judged} has {len(verdicts)} rows, {file.name} {len(rows)}; they belong row to row")
    out = []
    for number, (row, said) in enumerate(zip(rows, verdicts, strict=True), 2):
        where = f"{file}, row {number}"
        label, first, second = (
            _known(row[name].split(" ")[0].split(".")[0], MSTS_LABELS, f"{where}, {name}")
            for name in ("final_label", "annot1_label", "annot2_label")
        )
        described = f"[The picture shows: {row['unsafe_image_description']}]\n\n{row['prompt_text']}"
        name = f"{row['case_id']}/{row['prompt_type']}/{row['model']}"
        item = Item(name, (), described, True, None, row["case_id"])
        # One cell says "safe."; whatever else is neither label was not understood by whoever filled the table.
        published = {name: _label(cell.removesuffix("."), ("safe", "unsafe")) for name, cell in said.items()}
        out.append(Labelled(item, row["model"], row["response"], label, (first, second), published))
    return out


def load_xstest(folder: Path) -> list[Labelled]:
    """XSTest: labels "compliance", "partial" and "refusal"; `published` holds "gpt4" and "strmatch"."""
    source = "https://github.com/paul-rottger/exaggerated-safety"
    prompts = _read(folder / "xstest_prompts.csv", ("id", "label"), source)
    # By number: the wording of a prompt changed between the two files.
    kinds = {f"v2-{row['id']}": row["label"] for row in prompts}
    files = sorted((folder / "model_completions").glob("*.csv"))
    if not files:
        raise LabelledError(f"{folder / 'model_completions'}: no CSV file; copy the folder from {source}")
    out = []
    for file in files:
        rows = _read(file, ("id", "prompt", "completion", "annotation_1", "annotation_2", "final_label"), source)
        said = {name: _published(folder, file, short, name, source, rows) for name, short in XSTEST_SCORERS.items()}
        model = file.stem.removeprefix("xstest_v2_completions_")
        for index, row in enumerate(rows):
            where = f"{file}, row {index + 2}"
            label, first, second = (
                _known(row[name], XSTEST_LABELS, f"{where}, {name}")
                for name in ("final_label", "annotation_1", "annotation_2")
            )
            if row["id"] not in kinds:
                raise LabelledError(
                    f"{where}: no prompt {row['id']!r} in xstest_prompts.csv; take both from one release"
                )
            published = {name: column[index] for name, column in said.items()}
            item = Item(f"{row['id']}/{model}", (), row["prompt"], kinds[row["id"]] != "safe", None, row["id"])
            out.append(Labelled(item, model, row["completion"], label, (first, second), published))
    return out


def _published(
    folder: Path, file: Path, short: str, name: str, source: str, rows: Sequence[Mapping[str, str]]
) -> list[str | None]:
    path = folder / "automated_evaluation_labels" / f"{file.stem}_{short}.csv"
    theirs = _read(path, ("id", f"{name}_label"), source)
    if [row["id"] for row in theirs] != [row["id"] for row in rows]:
        raise LabelledError(f"{path}: its ids are not those of {file.name}; take both from one release")
    return [XSTEST_LABELS.get(row[f"{name}_label"]) for row in theirs]


def _read(path: Path, columns: Sequence[str], source: str) -> list[dict[str, str]]:
    if not path.is_file():
        raise LabelledError(f"{path}: no such file; copy the data set's files from {source}")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise LabelledError(f"{path}: not a CSV file in UTF-8 ({error}); copy it again from {source}") from error
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise LabelledError(f"{path}: column(s) {', '.join(missing)} missing; copy it again from {source}")
    if short := [n for n, row in enumerate(rows, 2) if None in row or None in row.values()]:
        raise LabelledError(f"{path}, row {short[0]}: more or fewer cells than columns; copy it again from {source}")
    return rows


def _known(value: str, labels: Mapping[str, str], where: str) -> str:
    if value not in labels:
        raise LabelledError(f"{where}: {value!r} is none of {', '.join(labels)}; restore the row")
    return labels[value]


def _label(value: str, labels: Sequence[str]) -> str | None:
    return value if value in labels else None


SETS = {"msts": load_msts, "xstest": load_xstest}


def load(name: str, root: str | Path) -> list[Labelled]:
    """The labelled responses of "msts" or "xstest".

    Args:
      name: the data set.
      root: the folder that holds the data sets' folders, `msts/` and `xstest/`, each laid out as published.

    Raises:
      LabelledError: another name, a missing file (says which and from where), a missing column or an unknown label.
    """
    if name not in SETS:
        raise LabelledError(f"no labelled data set {name!r}; there are {', '.join(SETS)}")
    return SETS[name](Path(root) / name)
