"""Pictures enter with licence and source, without metadata, once each, and after the moderator has seen them."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from srpo_jax.data.builder.intake import IntakeConfig, read_manifest, take_in
from srpo_jax.data.privacy import count_faces
from tests.data.builder.world import scene

CONFIG = IntakeConfig("CC0-1.0", "mine")


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for index in range(3):
        scene(index).picture.save(pictures / f"a{index}.png")
    return pictures


def test_the_stored_copy_has_the_pixels_upright_and_none_of_the_metadata(folder, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[1] = "N"
    picture = PIL.Image.new("RGB", (40, 20), (9, 99, 200))
    picture.save(folder / "b.jpg", exif=exif, comment=b"SecretComment")
    assert b"SecretCamera" in (folder / "b.jpg").read_bytes() and b"SecretComment" in (folder / "b.jpg").read_bytes()
    taken, aside = take_in(folder, tmp_path / "out", {}, CONFIG)
    [mine] = [one for one in taken if one.name == "b.jpg"]
    stored = tmp_path / "out" / mine.stored
    with PIL.Image.open(stored) as opened:
        assert opened.size == (20, 40) and not opened.getexif() and not opened.info
    assert b"Secret" not in stored.read_bytes()
    assert [(f.check, f.level) for f in mine.findings] == [("metadata", "info")]
    assert "where it was taken" in mine.findings[0].text and not aside


def test_copies_leave_and_related_pictures_share_a_group(folder, tmp_path):
    original = PIL.Image.open(folder / "a0.png").convert("RGB")
    original.resize((180, 180)).save(folder / "sub/copy.jpg", quality=80)
    taken, aside = take_in(folder, tmp_path / "out", {}, CONFIG)
    assert [(a.picture, a.kind, a.reason) for a in aside] == [
        ("sub/copy.jpg", "duplicate", "nearly the same as a0.png")
    ]
    assert len({one.group for one in taken}) == 3
    related, _ = take_in(folder, tmp_path / "out", {}, IntakeConfig("CC0-1.0", "mine", 0, 64))
    groups = {one.name: one.group for one in related}
    assert groups["sub/copy.jpg"] == groups["a0.png"] != groups["a1.png"]


def test_no_licence_no_source_and_broken_files_are_set_aside_with_the_remedy(folder, tmp_path):
    (folder / "broken.png").write_bytes((folder / "a0.png").read_bytes()[:100])
    manifest = {f"a{i}.png": {"licence": "CC-BY-4.0", "source": "a shelf"} for i in (0, 1)} | {
        "a1.png": {"source": "x"}
    }
    manifest["broken.png"] = manifest["a0.png"]
    taken, aside = take_in(folder, tmp_path / "out", manifest, IntakeConfig())
    assert [(one.name, one.licence, one.source) for one in taken] == [("a0.png", "CC-BY-4.0", "a shelf")]
    told = {a.picture: (a.kind, a.reason) for a in aside}
    assert told["a1.png"] == ("no licence", "its licence is not known; give it in the manifest, or one for all")
    assert told["broken.png"][0] == "unreadable" and told["a2.png"][0] == "no licence"


def test_the_hook_sees_every_picture_first_and_what_it_refuses_is_not_stored(folder, tmp_path):
    seen = []

    def hook(kind, value):
        seen.append((kind, value.name))
        return "explicit" if value.name == "a1.png" else None

    taken, aside = take_in(folder, tmp_path / "out", {}, CONFIG, hook=hook)
    assert seen == [("image", f"a{i}.png") for i in range(3)]
    assert [one.name for one in taken] == ["a0.png", "a2.png"]
    assert [(a.picture, a.kind, a.reason) for a in aside] == [("a1.png", "moderator", "explicit")]
    assert len([*(tmp_path / "out/images").iterdir()]) == 2
    again, same = take_in(folder, tmp_path / "out", {}, CONFIG, hook=hook)
    assert (again, same, len(seen)) == (taken, aside, 3)  # what is known is not looked at again
    other, _ = take_in(folder, tmp_path / "out", {}, CONFIG)
    assert len(other) == 3  # another hook, or none, is another question


def test_a_broken_hook_stops_the_intake(folder, tmp_path):
    def hook(kind, value):
        raise OSError("the moderator is down")

    with pytest.raises(OSError, match="is down"):
        take_in(folder, tmp_path / "out", {}, CONFIG, hook=hook)


def test_what_was_taken_out_on_request_does_not_come_back(folder, tmp_path):
    first, _ = take_in(folder, tmp_path / "out", {}, CONFIG)
    picture = PIL.Image.open(folder / "a1.png")
    picture.save(folder / "a1.png", compress_level=0)  # another file of the same pixels
    removed = frozenset({first[0].sha256, first[1].stored_sha256})
    taken, aside = take_in(folder, tmp_path / "out", {}, IntakeConfig("CC0-1.0", "mine", removed=removed))
    assert [one.name for one in taken] == ["a2.png"]
    assert [(a.picture, a.kind) for a in aside] == [("a0.png", "removed"), ("a1.png", "removed")]
    with pytest.raises(ValueError, match="'x' is no SHA-256"):
        IntakeConfig(removed=frozenset({"x"}))


def test_faces_are_a_finding(folder, tmp_path):
    taken, _ = take_in(folder, tmp_path / "out", {}, CONFIG, faces=lambda picture: 2)
    assert [f.text for f in taken[0].findings if f.check == "faces"] == ["2 faces seen; check consent"]
    taken, _ = take_in(folder, tmp_path / "out", {}, CONFIG, faces=count_faces)
    assert not any(one.findings for one in taken)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"image": "a.png", "license": "MIT"}', "line 2: give an object with image"),
        ('{"image": "a.png", "source": 3}', "line 2, field 'source': must be text"),
        ('{"image": "z.png"}', "line 2: 'z.png' was told of before"),
    ],
)
def test_a_manifest_names_line_and_field_that_are_wrong(line, told, tmp_path):
    file = tmp_path / "manifest.jsonl"
    file.write_text(json.dumps({"image": "z.png"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=told):
        read_manifest(file)


def test_a_manifest_about_pictures_that_are_not_there_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"'x.png', which is not in"):
        take_in(folder, tmp_path / "out", {"x.png": {}}, CONFIG)
    with pytest.raises(ValueError, match="no pictures"):
        take_in(tmp_path / "empty", tmp_path / "out", {}, CONFIG)
