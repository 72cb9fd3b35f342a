"""Published safety fine-tuning sets as supervised records: what each layout tells, and what it does not.

None of them has the six steps of a reference path, so none becomes an SSUI record: they train as trunks without branches.
`LAYOUTS` says of each where its fields were read, and what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from srpo_jax.paths import STYLES, Status, parse

Fields = dict[str, Any]


class ConversionError(ValueError):
    """A row that a layout does not explain: which field, what is wrong, what to do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a published data set become records.

    Attributes:
      convert: fields of an `SftRecord` for each example of a row.
      source: the data set, and where its fields were read.
      verified: whether they were read in the data set's own files or documentation; otherwise in code that writes or reads it.
      missing: what its records do not tell.
    """

    convert: Callable[[Mapping[str, Any]], Iterator[Fields]]
    source: str
    verified: bool
    missing: tuple[str, ...]


def _think_in_safety(row: Mapping[str, Any]) -> Iterator[Fields]:
    images = _given(row, "images", list)
    question, reply = _turns(row, len(images))
    yield {"images": images, "question": question, **_split(reply, "conversations")}


def _vlguard(row: Mapping[str, Any]) -> Iterator[Fields]:
    safe_image = _given(row, "safe", bool)
    for pair in _given(row, "instr-resp", list):
        kinds = [key for key in ("instruction", "safe_instruction", "unsafe_instruction") if key in pair]
        if len(kinds) != 1 or safe_image is (kinds == ["instruction"]):
            image = "a safe" if safe_image else "an unsafe"
            raise ConversionError(f"field 'instr-resp': {image} image has {sorted(pair)}")
        kind = kinds[0]
        yield {
            "id": f"{_given(row, 'id', str)}:{kind}",
            "images": [_given(row, "image", str)],
            "question": _text(pair, kind),
            "answer": _text(pair, "response"),
            "risky": kind != "safe_instruction",
            "category": row.get("harmful_category") if kind == "instruction" else None,
            "meta": {"subset": kind} | _kept(row, "harmful_subcategory"),
        }


def _spa_vl(row: Mapping[str, Any]) -> Iterator[Fields]:
    if "chosen" not in row:
        raise ConversionError("has no field 'chosen': SPA-VL's test split holds no replies; evaluate on it instead")
    image = row.get("image")
    yield {
        **({"id": str(row["id"])} if "id" in row else {}),
        "images": [] if image is None else [image],
        "question": _text(row, "question"),
        "answer": _text(row, "chosen"),
        "meta": {"rejected": _text(row, "rejected")} | _kept(row, "image_name", "class1", "class2", "class3"),
    }


def _mis(row: Mapping[str, Any]) -> Iterator[Fields]:
    if "conversations" not in row:
        raise ConversionError(
            "has no field 'conversations': the test sets of MIS hold no replies; evaluate on them instead"
        )
    found = row.get("image", row.get("images"))
    images = [found] if isinstance(found, str) else found
    if not isinstance(images, list):
        raise ConversionError(f"field 'image' must be a list of file names, not {type(found).__name__}")
    question, reply = _turns(row, len(images))
    yield {
        **({"id": str(row["id"])} if "id" in row else {}),
        "images": images,
        "question": question,
        "answer": reply,
        "category": row.get("category"),
        "meta": _kept(row, "sub_category"),
    }


def _star_1(row: Mapping[str, Any]) -> Iterator[Fields]:
    category = row.get("category")  # rows of its harmless companion, STAR-benign, have none
    response = _text(row, "response").replace(
        "\\/", "/"
    )  # some spell slashes as JSON escapes; its training undoes this, too
    yield {
        "id": str(row["id"]) if "id" in row else None,
        "images": [],
        "question": _text(row, "question"),
        **_split(response, "response"),
        "risky": True if category else None,
        "category": ", ".join(map(str, category)) if isinstance(category, list) else category,
        "meta": _kept(row, "source", "score"),
    }


def _siuo(row: Mapping[str, Any]) -> Iterator[Fields]:
    yield {
        "id": str(row["question_id"]) if "question_id" in row else None,
        "images": [_given(row, "image", str)],
        "question": _text(row, "question"),
        "answer": _text(row, "reference_answer"),
        "risky": True,
        "category": row.get("category"),
        "meta": _kept(row, "safety_warning"),
    }


LAYOUTS: dict[str, Layout] = {
    "think-in-safety": Layout(
        _think_in_safety,
        "Think in Safety (Lou et al., EMNLP-25), train_data.json of its repository",
        True,
        ("ids", "six steps (the reasoning is free text)", "whether a request is risky", "categories"),
    ),
    "vlguard": Layout(
        _vlguard,
        "VLGuard (Zong et al., ICML-24), data/train.json of its repository",
        True,
        ("reasoning", "categories of risky requests about safe images"),
    ),
    "spa-vl": Layout(
        _spa_vl,
        "SPA-VL (Zhang et al., CVPR-25), the fields named in its repository's README",
        True,
        ("reasoning", "whether a request is risky"),
    ),
    "mis": Layout(
        _mis,
        "MIS (Ding et al., ICLR-26), mis_train.json as other projects read it",
        False,
        ("reasoning apart from the answer", "whether a request is risky", "places of the images within the question"),
    ),
    "star-1": Layout(
        _star_1,
        "STAR-1 (Wang et al., AAAI-26), the fields as the scripts of its repository write and train on them",
        False,
        ("images (it is text only)", "six steps (the reasoning is free text)"),
    ),
    "siuo": Layout(
        _siuo,
        "SIUO (Wang et al., NAACL-25), data/siuo_gen.json of its repository; an evaluation set: never report on it after "
        "training on it",
        True,
        ("reasoning",),
    ),
}
"""Layouts by name."""


def convert_row(layout: str, values: Any, default_id: str) -> list[Fields]:
    """The fields of the records of one row, `meta` naming the layout and what is missing.

    Raises:
      ConversionError: the row is not of this layout; names the field.
    """
    if not isinstance(values, Mapping):
        raise ConversionError(f"a row is an object, not {type(values).__name__}")
    known = LAYOUTS[layout]
    records = list(known.convert(values))
    for record in records:
        if record.get("id") is None:
            record["id"] = default_id
        record["meta"] = {**record.get("meta", {}), "layout": layout, "missing": list(known.missing)}
    return records


def _given(row: Mapping[str, Any], field: str, kind: type) -> Any:
    if not isinstance(row.get(field), kind):
        told = "is missing" if field not in row else f"must be a {kind.__name__}, not {type(row[field]).__name__}"
        raise ConversionError(f"field {field!r} {told}; is it of this layout?")
    return row[field]


def _text(row: Mapping[str, Any], field: str) -> str:
    return _given(row, field, str)


def _kept(row: Mapping[str, Any], *fields: str) -> Fields:
    return {field: row[field] for field in fields if row.get(field) is not None}


def _turns(row: Mapping[str, Any], images: int) -> tuple[str, str]:
    """Question, without its image tags, and reply of a conversation of two turns."""
    turns = _given(row, "conversations", list)
    speakers = [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns]
    if speakers != ["human", "gpt"]:
        raise ConversionError(
            f"field 'conversations' has turns of {speakers}; one of human, then one of gpt are expected"
        )
    question = _text(turns[0], "value")
    if question.count("<image>") != images:
        raise ConversionError(f"the question has {question.count('<image>')} tags <image> for {images} images")
    return question.replace("<image>", "").strip(), _text(turns[1], "value")


def _split(reply: str, field: str) -> Fields:
    """Reasoning and answer of a reply whose reasoning stands in tags; ConversionError for one without an answer."""
    path = parse(reply, stopped=True, grammar=STYLES["short"])
    if path.status is not Status.OK:
        raise ConversionError(f"field {field!r}: the reply is no <think> … </think> and an answer ({path.status})")
    return {"reasoning": path.steps[0].text, "answer": path.answer}
