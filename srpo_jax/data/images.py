"""Opening pictures of unknown origin safely, and always to the same RGB pixels."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

MAX_PIXELS = 50_000_000
"""Largest width × height opened by default: 150 MB of RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats decoded; Pillow knows more, some of which start other programs. JPEG includes phones' multi-picture files."""


class ImageError(ValueError):
    """A picture that cannot or must not be opened; the message names it, the cause and the remedy."""


def open_image(source: str | Path | bytes | PIL.Image.Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Opens a picture, first frame if it has several, as 8-bit RGB.

    The EXIF orientation is applied. Transparent pixels are laid over white. Gray values of 16 bits are scaled to 8
    (value // 257). Palettes, CMYK and the like are converted as Pillow does. The size is read from the header and
    checked before any pixel is decoded.

    Args:
      source: a file, an encoded picture, or a decoded one (which is not changed).
      max_pixels: largest allowed width × height.

    Returns:
      A picture of mode "RGB", at least 1 × 1.

    Raises:
      ImageError: if the file is missing, is no regular file, is empty, is of none of `FORMATS`, is cut short or
        otherwise broken, has no pixels, has too many, or has floating-point pixels.
    """
    if isinstance(source, PIL.Image.Image):
        _check_size(source, "the picture in memory", max_pixels)
        return _converted(source, "the picture in memory")
    name = "the embedded picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        _check_file(Path(source))
    elif not source:
        raise ImageError(f"{name} holds no bytes; restore it or remove the record")
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_size(image, name, max_pixels)
            image.load()
            return _converted(image, name)
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture of the formats {', '.join(FORMATS)}; convert it to PNG") from None
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; scale it down") from error
    except Exception as error:  # Decoders raise many kinds on broken data, not all of them documented.
        raise ImageError(f"{name}: cut short or damaged ({error}); restore it or remove the record") from error


def _check_file(path: Path) -> None:
    # A pipe or a device would block or never end.
    if not path.is_file():
        raise ImageError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty; restore it or remove the record")


def image_url(image: str | Path | PIL.Image.Image, side: int, size: int) -> str:
    """A picture as a data URL of bounded size: PNG if it fits, else JPEG; pixels only, no metadata.

    Args:
      image: see `open_image`.
      side: it is shrunk to this many pixels on its longer side.
      size: most bytes of the file within the URL.

    Raises:
      ImageError: it cannot be read, or does not fit into `size` bytes.
    """
    picture = open_image(image)
    picture.thumbnail((side, side))
    for kind, options in (("png", {}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        if buffer.tell() <= size:
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise ImageError(
        f"a picture of {picture.width} × {picture.height} does not fit into {size} bytes; lower image_side"
    )


def _check_size(image: PIL.Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} × {height}); restore it or remove the record")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} × {height} is more than {max_pixels:,} pixels; scale it down, or raise max_pixels"
        )


def _converted(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(f"{name}: has floating-point pixels, of unknown range; convert it to 8 bits")
    if image.mode.startswith("I"):
        # Pillow would clip these at 255 and turn most of the picture white.
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        return PIL.Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    # convert() of an RGB picture is a copy, so the caller never gets the source itself.
    return image.convert("RGB")


def image_in(folder: Path, name: Any) -> Path:
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
    """Writes an embedded image to the folder, unless it is there, and returns the file; a name is one of a file there."""
    content = _content(value)
    if isinstance(content, str):
        return image_in(folder, content)
    file = folder / hashlib.sha256(content).hexdigest()
    if not file.is_file() or file.stat().st_size != len(content):
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may do the same at once: each renames its own whole copy.
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)
    return file


def decoded_image(value: Any) -> PIL.Image.Image:
    """An embedded image in memory."""
    content = _content(value)
    if isinstance(content, str):
        raise ImageError(f"{content!r} is the name of a file; name the folder of the images")
    return open_image(content)


def _content(value: Any) -> bytes | str:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if content is None and isinstance(value, Mapping):
        content = value.get("path")
    if not isinstance(content, bytes | str):
        raise ImageError(f"a {type(content).__name__} is no image; embed the bytes of one of {', '.join(FORMATS)}")
    return content
