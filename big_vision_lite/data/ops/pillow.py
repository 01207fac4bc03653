"""Decodes by Pillow what is rare: GIF, BMP, TIFF, AVIF, and odd kinds of others."""

import functools
import io
from typing import Any

import numpy as np

from big_vision_lite.data.image_formats import Encoded
from big_vision_lite.data.ops.orientation import AS_STORED, turned_back
from big_vision_lite.data.undecodable import UndecodableImage, check_pixels

# Pillow's modes whose range says nothing of what is white.
OPEN_RANGE = {"I": "32-bit integers", "F": "floats", "LAB": "LAB colours"}
# Of a TIFF.
BITS_PER_SAMPLE = 258
# Of EXIF.
ORIENTATION = 0x112
# What a file with an orientation has somewhere in its bytes.
MARKS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")


@functools.cache
def readers() -> dict[str, Any]:
    """Returns Pillow's class of each format; it is loaded where it is needed."""
    from PIL import (
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    # Many ops run side by side in worker threads: libavif's own would fight them.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    # Not PIL.Image.open, which warns of half the pixels that are allowed here.
    return {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "AVIF": AvifImagePlugin.AvifImageFile,
    }


def decode(data: Encoded, name: str) -> np.ndarray:
    """Returns uint8 [H, W, 1 | 3 | 4] of the first picture, turned as it is stored.

    Raises UndecodableImage for bytes that are damaged, cut short or of samples that are
    no colours in a known range.
    """
    try:
        with readers()[name](io.BytesIO(data)) as image:
            check_pixels(image.height, image.width, name)
            # Pillow turns what it loads of a TIFF.
            orientation = _orientation_of(image) if name == "TIFF" else AS_STORED
            image.load()
            return turned_back(_pixels(image, name), orientation)
    except UndecodableImage:
        raise
    except Exception as error:  # Pillow raises a dozen kinds
        reason = str(error) or type(error).__name__
        raise UndecodableImage(f"{name} is damaged or odd: {reason}") from error


def orientation_of(data: Encoded, name: str) -> int:
    """Returns 1 to 8, as EXIF (or else XMP) counts them; 1 where nothing is said.

    `name` is the format. Damaged EXIF says nothing: it is no part of the picture.
    """
    data = bytes(data)
    # A TIFF has the tag itself, an AVIF one of its own.
    if name not in ("TIFF", "AVIF") and not any(mark in data for mark in MARKS):
        return AS_STORED
    try:
        with readers()[name](io.BytesIO(data)) as image:
            return _orientation_of(image)
    except Exception:  # of EXIF; bytes without a picture are refused by `decode`
        return AS_STORED


def _orientation_of(image: Any) -> int:
    found = image.getexif().get(ORIENTATION, AS_STORED)
    return found if isinstance(found, int) and 1 <= found <= 8 else AS_STORED


def _pixels(image: Any, name: str) -> np.ndarray:
    if image.mode in OPEN_RANGE:
        raise UndecodableImage(
            f"{name} holds {OPEN_RANGE[image.mode]}; convert it to 8 or 16 bit RGB"
        )
    if image.mode.startswith("I;16"):
        return _high_bytes(image)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.array(image.convert("L"))[..., None]
    clear = "transparency" in image.info or image.mode in ("LA", "La", "PA")
    if not clear and image.mode not in ("RGBA", "RGBa"):
        return np.array(image.convert("RGB"))
    pixels = np.array(image.convert("RGBA"))
    if name == "BMP" and not pixels[..., 3].any():
        # The fourth byte is unused, whatever the header says of it: nobody draws in
        # colours that cannot be seen.
        return np.ascontiguousarray(pixels[..., :3])
    return pixels


def _high_bytes(image: Any) -> np.ndarray:
    samples = np.asarray(image)
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
    gray = (samples >> (bits - 8)).astype(np.uint8)[..., None]
    if "transparency" not in image.info:
        return gray
    alpha = np.where(samples[..., None] == image.info["transparency"], 0, 255)
    return np.concatenate([gray] * 3 + [alpha.astype(np.uint8)], axis=-1)
