"""Pictures enter: with a licence and a source, readable, looked at by the hook, stripped of metadata, once each.

The stored copy holds pixels and nothing else (EXIF, GPS, thumbnails, comments are gone); it is PNG, named after its pixels.
Later stages, agents included, see the copy only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from srpo_jax.data.builder.guards import Finding, Hook, moderated, name_of
from srpo_jax.data.images import ImageError, open_image
from srpo_jax.data.similarity import ImageIndex, image_groups, image_hash, repeated
from srpo_jax.files import Store

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
IMAGES = "images"
FIELDS = {"image", "source", "licence", "description"}
Faces = Callable[[PIL.Image.Image], int]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was taken in.

    Attributes:
      id: made from its pixels.
      name: of the given file, relative to the folder of pictures.
      sha256: of the given file.
      stored: file name of the stored copy, relative to the output folder.
      stored_sha256: of the stored copy.
      source: where it comes from.
      licence: under which it may be used.
      description: what it shows, for agents that read text only; None if the manifest has none.
      hash: hexadecimal perceptual hash (see `similarity.image_hash`).
      findings: for reviewers.
      group: id of the first of the pictures that are related to it; they share a split.
    """

    id: str
    name: str
    sha256: str
    stored: str
    stored_sha256: str
    source: str
    licence: str
    description: str | None
    hash: str
    findings: tuple[Finding, ...]
    group: str = ""

    def provenance(self) -> dict[str, str]:
        """What a record tells of its picture."""
        told = {name: getattr(self, name) for name in ("name", "source", "licence", "sha256", "stored_sha256")}
        return told | {"metadata": "removed"}


@dataclasses.dataclass(frozen=True)
class SetAside:
    """What left the line, at which stage, and why."""

    id: str
    picture: str
    stage: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class IntakeConfig:
    """How pictures enter.

    Attributes:
      licence: of every picture whose manifest line gives none; "" sets such pictures aside.
      source: the same for where they come from.
      duplicate_bits: pictures whose hashes (256 bits) differ in at most so many are copies; the first by name stays.
      related_bits: the same for pictures that share a split.
      removed: SHA-256 of pictures, as given or as stored, that somebody had taken out: they do not come back.

    Raises:
      ValueError: bits out of range, or what is no SHA-256.
    """

    licence: str = ""
    source: str = ""
    duplicate_bits: int = 16
    related_bits: int = 48
    removed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.duplicate_bits <= self.related_bits <= 256:
            raise ValueError("0 <= duplicate_bits <= related_bits <= 256 must hold")
        if wrong := sorted(one for one in self.removed if not re.fullmatch("[0-9a-f]{64}", one)):
            raise ValueError(f"removed: {wrong[0]!r} is no SHA-256 in lower-case hexadecimal digits")


def read_manifest(path: str | Path | None) -> dict[str, dict[str, str]]:
    """image name → {source, licence, description} of a JSON-lines file; {} without one.

    Raises:
      ValueError: a line that is no object with these fields as texts, or a picture that comes twice; names file and line.
    """
    told: dict[str, dict[str, str]] = {}
    if path is None:
        return told
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(values, dict) or values.keys() - FIELDS or not values.get("image"):
                raise ValueError(
                    f"{path}, line {number}: give an object with image and any of {', '.join(sorted(FIELDS))}"
                )
            if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
                raise ValueError(f"{path}, line {number}, field {wrong[0]!r}: must be text")
            name = values.pop("image")
            if name in told:
                raise ValueError(f"{path}, line {number}: {name!r} was told of before; keep one line")
            told[name] = values
    return told


def take_in(
    folder: str | Path,
    output: Path,
    manifest: Mapping[str, Mapping[str, str]],
    config: IntakeConfig,
    *,
    hook: Hook | None = None,
    faces: Faces | None = None,
) -> tuple[list[Picture], list[SetAside]]:
    """The pictures of a folder, in order of their names, and what was set aside.

    What is known of a file is kept in `output`/work/pictures.jsonl under its content, so a restart looks at new files only.

    Args:
      folder: searched with its folders for files of `SUFFIXES`.
      output: stored copies go to its folder `images`.
      manifest: see `read_manifest`.
      config: licences and distances.
      hook: sees every picture before anybody else does, and may refuse it. What it said is kept under its name.
      faces: counts faces, for a finding, the same way; None leaves that out.

    Raises:
      ValueError: no picture in the folder, or a manifest's line about a picture that is not there.
    """
    root = Path(folder)
    files = _pictures_in(root, manifest)
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    aside: list[SetAside] = []
    taken: list[Picture] = []
    with Store.open(output / "work", "pictures.jsonl") as store:
        known = {line["key"]: line for line in store.lines}
        for name, file in files.items():
            told = {"licence": config.licence, "source": config.source, **manifest.get(name, {})}
            if missing := [field for field in ("licence", "source") if not told[field].strip()]:
                what = f"its {missing[0]} is not known; give it in the manifest, or one for all"
                aside.append(SetAside(name, name, "intake", f"no {missing[0]}", what))
                continue
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            if sha256 in config.removed:
                aside.append(SetAside(name, name, "intake", "removed", "it was taken out on request"))
                continue
            key = f"{sha256}, moderator {name_of(hook)}, faces {name_of(faces)}"
            line = known.get(key)
            if line is None or ("stored" in line and not (output / line["stored"]).is_file()):
                line = {"key": key, **_look(file, output, hook, faces)}
                if line != known.get(key):
                    store.append(line)
            if "reason" in line:
                aside.append(SetAside(name, name, "intake", line["kind"], line["reason"]))
            elif line["stored_sha256"] in config.removed:
                aside.append(SetAside(line["id"], name, "intake", "removed", "it was taken out on request"))
            else:
                taken.append(_picture(name, sha256, told, line))
    kept, copies = _first_of_copies(taken, config.duplicate_bits)
    return _grouped(kept, config.related_bits), aside + copies


def _pictures_in(root: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Name → file of the pictures of a folder, in order; all that the manifest tells of are among them."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{root}: no pictures ({', '.join(sorted(SUFFIXES))})")
    named = {str(p.relative_to(root)): p for p in files}
    if lost := sorted(manifest.keys() - named.keys()):
        more = f" (and {len(lost) - 1} more)" * (len(lost) > 1)
        raise ValueError(f"the manifest tells of {lost[0]!r}, which is not in {root}{more}")
    return named


def _picture(name: str, sha256: str, told: Mapping[str, str], line: Mapping[str, Any]) -> Picture:
    """A picture from what the manifest tells of its file and what was found when it was looked at."""
    return Picture(
        name=name,
        sha256=sha256,
        source=told["source"],
        licence=told["licence"],
        description=told.get("description") or None,
        findings=tuple(Finding(**finding) for finding in line["findings"]),
        **{field: line[field] for field in ("id", "stored", "stored_sha256", "hash")},
    )


def _look(file: Path, output: Path, hook: Hook | None, faces: Faces | None) -> dict[str, Any]:
    """What is kept of a file: where its copy is and what was found, or why it is refused."""
    try:
        picture = open_image(file)
    except ImageError as error:
        return {"kind": "unreadable", "reason": str(error)}
    if reason := moderated(hook, "image", file):
        return {"kind": "moderator", "reason": reason}
    buffer = io.BytesIO()
    picture.save(buffer, "png")  # open_image gives bare pixels: nothing of the file's metadata is there to be saved
    content = buffer.getvalue()
    name = hashlib.sha256(content).hexdigest()
    stored = f"{IMAGES}/{name[:16]}.png"
    partial = output / f"{stored}.partial"
    partial.write_bytes(content)
    partial.replace(output / stored)
    findings = list(_findings(file, picture, faces))
    return {
        "id": f"p{name[:12]}",
        "stored": stored,
        "stored_sha256": name,
        "hash": image_hash(picture).tobytes().hex(),
        "findings": [finding._asdict() for finding in findings],
    }


def _findings(file: Path, picture: PIL.Image.Image, faces: Faces | None) -> Iterator[Finding]:
    with PIL.Image.open(file) as opened:
        exif = opened.getexif()
        located = bool(exif.get_ifd(0x8825))
    if exif:
        what = "the file told where it was taken" if located else "the file had metadata"
        yield Finding("metadata", "images", "info", f"{what}; the stored copy has none")
    if faces is not None and (count := faces(picture)):
        yield Finding("faces", "images", "warning", f"{count} face{'s' * (count > 1)} seen; check consent")


def _first_of_copies(pictures: list[Picture], bits: int) -> tuple[list[Picture], list[SetAside]]:
    """Those that are no near-duplicate of one that stays, in order, and the others."""
    hashes = _hashes(pictures)
    index = ImageIndex(hashes, bits)
    copies = repeated(lambda i: index.near(hashes[i]).tolist(), range(len(pictures)))
    aside = [
        SetAside(pictures[i].id, pictures[i].name, "intake", "duplicate", f"nearly the same as {pictures[first].name}")
        for i, first in sorted(copies.items())
    ]
    return [picture for i, picture in enumerate(pictures) if i not in copies], aside


def _grouped(pictures: list[Picture], bits: int) -> list[Picture]:
    groups = image_groups(_hashes(pictures), bits)
    return [dataclasses.replace(p, group=pictures[g].id) for p, g in zip(pictures, groups, strict=True)]


def _hashes(pictures: list[Picture]) -> np.ndarray:
    data = b"".join(bytes.fromhex(picture.hash) for picture in pictures)
    return np.frombuffer(data, np.uint8).reshape(len(pictures), 32)
