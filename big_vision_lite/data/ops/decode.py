"""Decodes bytes or arrays to uint8 images [H, W, C], and refuses everything else.

Masks [H, W] are the integers that their PNG stores.
"""

import dataclasses
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import simplejpeg

from big_vision_lite.data import MAX_PIXELS

# Ops run in many worker threads, with which OpenCV's own threads would compete.
cv2.setNumThreads(0)
# UndecodableImage reports what OpenCV would print about a damaged file.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# The Example of types.py, which ops cannot import: worker processes load no jax.
Example = dict[str, Any]

Encoded = bytes | bytearray | memoryview


class UndecodableImage(ValueError):
    """Raised for bytes that were read but are no usable image; `reason` says why.

    The pipeline skips and counts such an example; any other error ends the run.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self):  # It is pickled on the way back from a worker process.
        return type(self), (self.reason,)


def decode(data: Encoded | np.ndarray, channels: int = 3) -> np.ndarray:
    """Returns uint8 [H, W, channels], 1 (gray) or 3 (RGB), from a file's bytes.

    Reads JPEG (accurate DCT, as PIL does), PNG, WebP, BMP and GIF, told apart by their
    first bytes; of uint8 arrays [H, W] and [H, W, 1|3|4] only the channels change.
    EXIF rotation is ignored, as in TensorFlow. Transparency is composited on white, as
    viewers do: the colour below it is often plain black. 16-bit samples keep their high
    byte, as in TensorFlow; CMYK becomes RGB; an animation gives its first frame. Raises
    UndecodableImage for bytes that are damaged, cut short, no image, or of more than
    MAX_PIXELS; ValueError for another kind of array.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: use 1 (gray) or 3 (RGB).")
    if isinstance(data, np.ndarray):
        return _convert(_check_array(data), channels)
    head = bytes(data[:32])
    if not head:
        raise UndecodableImage("0 bytes: the file is empty")
    if head.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(data, channels)
    # In a WebP the file's length lies between the two words.
    start = head[:4] + head[8:12] if head.startswith(b"RIFF") else head
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            return _convert(_decode_other(data, name), channels)
    raise UndecodableImage(
        f"not a JPEG, PNG, WebP, BMP or GIF: the first bytes are {head[:8]!r}"
    )


def decode_mask(data: Encoded | np.ndarray) -> np.ndarray:
    """Returns the integers [H, W] of a PNG of one channel, exactly as it stores them.

    Reads 1, 2, 4, 8 and 16 bits, as uint8 or uint16; a palette PNG gives the indices,
    which are the classes, not the colours. Arrays pass through. Raises UndecodableImage
    for damaged bytes, ValueError for another format or several channels.
    """
    if isinstance(data, np.ndarray):
        return data
    head = bytes(data[:33])
    if not head:
        raise UndecodableImage("0 bytes: the mask is empty")
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f'"mask" begins with {head[:8]!r}, no PNG: other formats change or blend '
            "classes. Store masks as PNG of one channel."
        )
    if len(head) < 33:
        raise UndecodableImage("PNG of the mask is cut short")
    bits, kind = head[24], head[25]
    if kind not in (_PNG_GRAY, _PNG_PALETTE):
        raise ValueError(
            '"mask" is a PNG of several channels, in colours or with transparency; '
            "store one channel of class indices, or a palette."
        )
    if kind == _PNG_PALETTE:
        data = _without_palette(bytes(data))
    mask = _pixels(data, "PNG of the mask")
    # OpenCV scales fewer than 8 bits to 0..255.
    return mask if bits >= 8 else mask // (255 // (2**bits - 1))


def decode_keys(example: Example, channels: int) -> Example:
    """Returns the example with its image and, if it has one, its mask decoded.

    Raises:
        ValueError: there is no image, or the mask has another size; see `decode`.
    """
    if "image" not in example:
        raise ValueError(f'Decoding needs the key "image", got {sorted(example)}.')
    image = decode(example["image"], channels)
    if "mask" not in example:
        return example | {"image": image}
    mask = decode_mask(example["mask"])
    check_mask(mask, image)
    return example | {"image": image, "mask": mask}


def check_mask(mask: Any, image: np.ndarray) -> None:
    """Raises ValueError unless `mask` has one integer or bool for every pixel."""
    is_array = isinstance(mask, np.ndarray)
    if not is_array or mask.dtype.kind not in "uib" or mask.shape[2:] not in ((), (1,)):
        got = f"{mask.dtype} {list(mask.shape)}" if is_array else type(mask).__name__
        raise ValueError(
            f'"mask" must hold integers [H, W] or [H, W, 1], got {got}; the bytes of a '
            "PNG become that by Decode()."
        )
    if mask.shape[:2] != image.shape[:2]:
        raise ValueError(
            f'"mask" has {" x ".join(map(str, mask.shape[:2]))} pixels, its image '
            f"{image.shape[0]} x {image.shape[1]}; they must be of one size: repair "
            "this example, or resize its mask in the source."
        )


def image_of(example: Example, op: Any) -> np.ndarray:
    """Returns the image of `example`; raises ValueError if it is not decoded yet."""
    image = example.get("image")
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        return image
    name = type(op).__name__
    if image is None:
        raise ValueError(f'{name} needs the key "image", got {sorted(example)}.')
    if isinstance(image, np.ndarray):
        got = f"{image.dtype} {list(image.shape)}"
    else:
        got = type(image).__name__
    raise ValueError(
        f"{name} needs a uint8 image [H, W, C], got {got}: put Decode() before it."
    )


def check_pixels(height: int, width: int, what: str) -> None:
    """Raises UndecodableImage for no pixels or more than MAX_PIXELS of `what`."""
    if height < 1 or width < 1:
        raise UndecodableImage(f"{what} has no pixels: {height} x {width}")
    if height * width > MAX_PIXELS:
        raise UndecodableImage(
            f"{what} has {height} x {width} = {height * width:,} pixels, above the "
            f"limit of {MAX_PIXELS:,}; store it smaller"
        )


def _decode_jpeg(data: Encoded, channels: int) -> np.ndarray:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: the sampling is unknown.
        raise UndecodableImage(f"JPEG header is damaged or odd: {error}") from error
    check_pixels(int(height), int(width), "JPEG")
    colorspace = "GRAY" if channels == 1 else "RGB"
    try:
        return simplejpeg.decode_jpeg(data, colorspace)
    except ValueError as error:
        # Some cameras write padding bytes before the end marker, which are no damage;
        # everything else that libjpeg warns about is, missing data above all.
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise UndecodableImage(f"JPEG is damaged or cut short: {error}") from error
    try:
        return simplejpeg.decode_jpeg(data, colorspace, strict=False)
    except ValueError as error:
        raise UndecodableImage(f"JPEG is damaged: {error}") from error


def _decode_other(data: Encoded, name: str) -> np.ndarray:
    image = _pixels(data, name)
    if image.dtype == np.uint16:
        image = np.right_shift(image, 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UndecodableImage(f"{name} holds {image.dtype} samples, not 8 or 16 bit")
    if image.ndim == 2:
        return image[..., None]
    to_rgb = cv2.COLOR_BGR2RGB if image.shape[-1] == 3 else cv2.COLOR_BGRA2RGBA
    return cv2.cvtColor(image, to_rgb)


def _pixels(data: Encoded, name: str) -> np.ndarray:
    """Returns pixels as stored: 16 bit, gray and alpha stay, colours are BGR."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE_PIXELS" in error.err:
            raise UndecodableImage(
                f"{name} has more than {MAX_PIXELS:,} pixels, the limit; store it "
                "smaller"
            ) from error
        raise UndecodableImage(f"{name} is damaged: {error.err}") from error
    if image is None:
        raise UndecodableImage(f"{name} is damaged or cut short")
    # OpenCV has a larger limit if it was imported before this package.
    check_pixels(image.shape[0], image.shape[1], name)
    return image


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise ValueError(
            f"An image array must be uint8 in 0..255, got {image.dtype}"
            f"{_describe_values(image)}. Convert it in the source, for values in 0..1 "
            "by np.rint(255 * image).astype(np.uint8)."
        )
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            "An image array must be [H, W] or [H, W, C] with 1, 3 or 4 channels and "
            f"at least one pixel, got {list(image.shape)}."
        )
    return image


def _describe_values(image: np.ndarray) -> str:
    if image.size == 0 or not np.issubdtype(image.dtype, np.number):
        return ""
    if not np.isfinite(image).all():
        return f" with {np.isnan(image).sum()} NaN and {np.isinf(image).sum()} infinite"
    return f" in {image.min():g}..{image.max():g}"


def _convert(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[-1] == 4:
        image = _on_white(image)
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]


def _on_white(image: np.ndarray) -> np.ndarray:
    alpha = image[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)
    # Rounds to the nearest; at most 255 * 255 + 127, which uint16 just holds.
    mixed = image[..., :3] * alpha + 255 * (255 - alpha) + 127
    return (mixed // 255).astype(np.uint8)


# Two of the PNG colour types.
_PNG_GRAY, _PNG_PALETTE = 0, 3


def _without_palette(data: bytes) -> bytes:
    """Returns the same PNG with its palette indices as gray values."""
    chunks, start = [data[:8]], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        name, body = data[start + 4 : start + 8], data[start + 8 : end - 4]
        if name == b"IHDR":
            header = name + body[:9] + bytes([_PNG_GRAY]) + body[10:]
            length, check = struct.pack(">I", len(body)), zlib.crc32(header)
            chunks.append(length + header + struct.pack(">I", check))
        elif name in (b"IDAT", b"IEND"):
            chunks.append(data[start:end])
        start = end
    return b"".join(chunks)


# {first bytes of a file: its format}.
_FORMATS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFFWEBP": "WebP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}


@dataclasses.dataclass(kw_only=True)
class Decode:
    """Turns encoded bytes or an array into uint8 [H, W, channels]; see `decode`.

    A "mask" beside the image becomes integers [H, W]; see `decode_mask`.
    """

    channels: int = 3

    def __post_init__(self):
        check_channels(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return decode_keys(example, self.channels)


def check_channels(op: Any) -> None:
    """Raises ValueError unless `op.channels` is 1 or 3."""
    if op.channels not in (1, 3):
        name = type(op).__name__
        raise ValueError(f"{name}.channels={op.channels}: use 1 (gray) or 3 (RGB).")
