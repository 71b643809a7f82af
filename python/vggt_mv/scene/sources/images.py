"""Image files: found to be whole before anything starts, and decoded to upright 8-bit RGB.

One rule for every kind of file:

* EXIF orientation is applied; sizes are those of the upright image.
* Transparent pixels are laid over white.
* 16-bit images keep their high byte (65535 -> 255); the scale is not stretched to what the image happens to hold.
* Of an animation, the first frame.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vggt_mv.errors import SceneError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

_EXIF_ORIENTATION = 0x0112
# Orientations 5 to 8 turn the image by a quarter: width and height change places.
_FIRST_QUARTER_TURN = 5
# What Pillow's decoders raise on damaged bytes (UnidentifiedImageError is an OSError).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def check_image(path: Path) -> tuple[int, int]:
    """Find out whether an image file is whole, as cheaply as its format allows, and how large the upright image is.

    A PNG carries checksums: reading them takes about a millisecond where decoding 1920 x 1080 pixels takes sixty. A
    JPEG has none; it is decoded at an eighth of its size, which reads every byte in a quarter of the time. Everything
    else is decoded in full.

    Returns:
        (height, width) in pixels, after EXIF orientation.

    Raises:
        SceneError: the file cannot be opened, is empty, is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "PNG":
                quarter_turn = _has_quarter_turn(image) if {"exif", "xmp"} & set(image.info) else False
                image.verify()
            else:
                if image.format in ("JPEG", "MPO"):
                    image.draft("RGB", (1, 1))
                image.load()
                quarter_turn = _has_quarter_turn(image)
    except _DECODER_ERRORS as error:
        raise _unreadable(path, error) from error
    return (width, height) if quarter_turn else (height, width)


def read_image(path: Path) -> Image.Image:
    """Decode an image file to an upright 8-bit RGB image.

    Raises:
        SceneError: the file cannot be opened, is empty, is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        return to_rgb(upright)
    except SceneError as error:
        raise SceneError(f"image {str(path)!r} {error}") from error
    except _DECODER_ERRORS as error:
        raise _unreadable(path, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode: transparency over white, 16 bits to their high byte.

    Raises:
        SceneError: 32-bit integer or float values outside of the range that has one obvious meaning.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise SceneError(
                f"has 32-bit integer values from {values.min()} to {values.max()}; values must fit 16 bits: convert it "
                "to 8 or 16 bits"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        floats = np.asarray(image)
        if not (np.isfinite(floats).all() and floats.min() >= 0 and floats.max() <= 1):
            raise SceneError(
                f"has float values from {floats.min():g} to {floats.max():g}; they must be finite and in [0, 1]: "
                "convert it to 8 or 16 bits"
            )
        return Image.fromarray(np.round(floats * 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # Premultiplied modes convert to their straight twins only, and those to RGBA.
        straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
        rgba = (image.convert(straight) if straight else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _has_quarter_turn(image: Image.Image) -> bool:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1)) >= _FIRST_QUARTER_TURN


def _unreadable(path: Path, error: Exception) -> SceneError:
    shown = f"image {str(path)!r}"
    if isinstance(error, (PermissionError, FileNotFoundError, IsADirectoryError)):
        return SceneError(f"{shown} cannot be opened ({error.strerror}); check that it is a file that you may read")
    try:
        head = path.read_bytes()[:8] if path.is_file() else b""
    except OSError as cannot_open:
        return SceneError(
            f"{shown} cannot be opened ({cannot_open.strerror}); check that it is a file that you may read"
        )
    if not head:
        return SceneError(f"{shown} is empty (0 bytes); copy it again or remove it")
    if isinstance(error, UnidentifiedImageError):
        return SceneError(f"{shown} is not an image in a known format (it starts with {head!r}); replace or remove it")
    if isinstance(error, Image.DecompressionBombError):
        return SceneError(f"{shown} is too large ({_one_line(error)}); scale it down")
    return SceneError(f"{shown} is truncated or damaged ({_one_line(error)}); copy it again or remove it")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
