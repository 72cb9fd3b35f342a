"""Opening pictures of unknown origin safely, and always to the same RGB pixels."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

MAX_PIXELS = 50_000_000
"""Largest width × height opened by default: 150 MB of RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats decoded; Pillow knows more, some of which start other programs. JPEG includes phones' multi-picture files."""


class ImageError(ValueError):
    """A picture that cannot or must not be opened; the message names it, the cause and the remedy."""


def open_image(source: str | Path | PIL.Image.Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Opens a picture, first frame if it has several, as 8-bit RGB.

    The EXIF orientation is applied. Transparent pixels are laid over white. Gray values of 16 bits are scaled to 8
    (value // 257). Palettes, CMYK and the like are converted as Pillow does. The size is read from the header and
    checked before any pixel is decoded.

    Args:
      source: a file, or a picture in memory (which is not changed).
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
    path = Path(source)
    # A pipe or a device would block or never end.
    if not path.is_file():
        raise ImageError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty; restore it or remove the record")
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            _check_size(image, str(path), max_pixels)
            image.load()
            return _converted(image, str(path))
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture of the formats {', '.join(FORMATS)}; convert it to PNG") from None
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}; scale it down") from error
    except Exception as error:  # Decoders raise many kinds on broken data, not all of them documented.
        raise ImageError(f"{path}: cut short or damaged ({error}); restore it or remove the record") from error


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
