"""Pictures of unknown origin: hostile ones are refused by name, every kind of pixel becomes the same RGB."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax.data.images import ImageError, open_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture(size=(8, 6)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats_give_the_pixels(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture().save(path, **({"lossless": True} if suffix == "webp" else {}))
    opened = open_image(path)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, I am no picture", "not a picture of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of the formats"),
        (png_header(100_000, 100_000), "scale it down"),
        (png_header(9_000, 9_000), r"9000 × 9000 is more than 50,000,000 pixels"),
        (png_header(0, 5), "no pixels|damaged|not a picture"),
        (png_header(5, 5), "cut short or damaged"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        open_image(path)
    assert str(path) in str(error.value)


def test_a_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (3000, 3000)).save(path)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="3000 × 3000 is more than 1,000,000 pixels"):
        open_image(path, max_pixels=1_000_000)


def test_missing_files_folders_and_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("none.png", "no such file"),
        (".", "not a regular file"),
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(tmp_path / name)


@settings(max_examples=40)
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "tiff"]), st.data())
def test_truncated_and_damaged_files_never_escape_as_another_error(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("images") / f"a.{suffix}"
    picture((32, 32)).save(path)
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert open_image(path, max_pixels=10**6).mode == "RGB"
    except ImageError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_a_truncated_picture_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture((64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match="cut short or damaged"):
        open_image(path)


def test_every_mode_becomes_the_same_rgb(tmp_path):
    def check(image: PIL.Image.Image, expected, suffix="png"):
        path = tmp_path / f"a.{suffix}"
        image.save(path)
        for source in (path, image):
            opened = open_image(source)
            assert (opened.mode, opened.size) == ("RGB", image.size)
            np.testing.assert_array_equal(np.asarray(opened)[0, 0], expected)

    check(PIL.Image.new("L", (2, 2), 100), [100, 100, 100])
    check(PIL.Image.new("1", (2, 2), 1), [255, 255, 255])
    check(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0)), [255, 255, 255])
    check(PIL.Image.new("RGBA", (2, 2), (200, 0, 0, 255)), [200, 0, 0])
    check(PIL.Image.new("LA", (2, 2), (0, 51)), [204, 204, 204])
    check(PIL.Image.new("CMYK", (2, 2), (0, 255, 255, 0)), [255, 0, 0], "tiff")
    check(PIL.Image.fromarray(np.full((2, 2), 257 * 77, np.uint16)), [77, 77, 77])
    palette = PIL.Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    check(palette, [10, 20, 30])
    palette.info["transparency"] = 1
    check(palette, [255, 255, 255])
    with pytest.raises(ImageError, match="floating-point"):
        open_image(PIL.Image.new("F", (2, 2), 0.5))


def test_orientation_is_applied(tmp_path):
    image = PIL.Image.new("RGB", (20, 10), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (10, 20)


def test_the_source_in_memory_is_not_changed_or_returned():
    image = picture()
    opened = open_image(image)
    opened.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    with pytest.raises(ImageError, match="the picture in memory: 8 × 6 is more than 10 pixels"):
        open_image(image, max_pixels=10)
    with pytest.raises(ImageError, match="no pixels"):
        open_image(PIL.Image.new("RGB", (0, 4)))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_multi_picture_jpeg_of_phones(tmp_path):
    frames = [PIL.Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.jpg").getpixel((8, 8))[0] > 250
