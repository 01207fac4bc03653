"""Decodes bytes or arrays to uint8 images [H, W, C], and refuses everything else.

Masks [H, W] are the integers that their PNG stores.
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from big_vision_lite.data import MAX_PIXELS
from big_vision_lite.data.image_formats import Encoded, format_of
from big_vision_lite.data.ops import pillow
from big_vision_lite.data.ops.jpeg import decode_jpeg
from big_vision_lite.data.ops.orientation import (
    AS_STORED,
    Orientation,
    turned,
    turned_boxes,
)
from big_vision_lite.data.undecodable import UndecodableImage, check_pixels

# Ops run in many worker threads, with which OpenCV's own threads would compete.
cv2.setNumThreads(0)
# UndecodableImage reports what OpenCV would print about a damaged file.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# The Example of types.py, which ops cannot import: worker processes load no jax.
Example = dict[str, Any]


def decode(
    data: Encoded | np.ndarray,
    channels: int = 3,
    orientation: Orientation = Orientation.IGNORE,
) -> np.ndarray:
    """Returns uint8 [H, W, channels]; files and most arrays as 1 (gray) or 3 (RGB).

    Reads JPEG (accurate DCT, as PIL does), PNG, WebP, BMP, GIF, TIFF and AVIF, told
    apart by their first bytes; uint8 arrays [H, W] and [H, W, 1|3|4] pass through with
    their channels converted. The pixels are those of PIL, of JPEGs in CMYK within 2 of
    255. EXIF's orientation is ignored, as in TensorFlow and therefore in big_vision,
    unless `orientation` says apply. Transparency is composited on white, what a viewer
    shows: the colour below it is often plain black; a BMP whose every alpha is 0 has
    none. 16-bit samples keep their high byte, as in TensorFlow; CMYK becomes RGB; an
    animation gives its first picture. Raises UndecodableImage for bytes that are
    damaged, cut short, no image, of samples without a known range, or larger than
    MAX_PIXELS; ValueError for another kind of array. Other numbers of `channels` are
    no colours: arrays [H, W, channels] pass through as they are, files are refused.
    """
    if channels not in (1, 3):
        return _as_it_is(data, channels)
    if isinstance(data, np.ndarray):
        return _convert(_check_array(data), channels)
    name = format_of(data)
    if name == "JPEG":
        image = decode_jpeg(data, channels)
    elif name == "PNG":
        image = _decode_png(bytes(data))
    elif name == "WebP":
        image = _by_opencv(data, name)
    else:
        image = pillow.decode(data, name)
    if orientation is Orientation.APPLY:
        image = turned(image, pillow.orientation_of(data, name))
    return _convert(image, channels)


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
    what = "PNG of the mask"
    mask = _pixels(_plain_png(bytes(data), what), what)
    # OpenCV spreads fewer bits over 0..255.
    return mask if bits >= 8 else mask // (255 // (2**bits - 1))


def decode_keys(
    example: Example, channels: int, orientation: Orientation = Orientation.IGNORE
) -> Example:
    """Returns the example with its image and, if it has one, its mask decoded.

    Mask and boxes refer to the pixels as stored and are turned with the image.

    Raises:
        ValueError: there is no image, or the mask has another size; see `decode`.
    """
    if "image" not in example:
        raise ValueError(f'Decoding needs the key "image", got {sorted(example)}.')
    data = example["image"]
    result = example | {"image": decode(data, channels)}
    if "mask" in example:
        result["mask"] = decode_mask(example["mask"])
        check_mask(result["mask"], result["image"])
    if orientation is Orientation.IGNORE or isinstance(data, np.ndarray):
        return result
    found = pillow.orientation_of(data, format_of(data))
    if found == AS_STORED:
        return result
    if "boxes" in example:
        check_boxes(example["boxes"])
        result["boxes"] = turned_boxes(example["boxes"], found)
    for key in ("image", "mask"):
        if key in result:
            result[key] = turned(result[key], found)
    return result


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


def check_boxes(boxes: object) -> None:
    """Raises ValueError unless these are floats [n, 4] in 0..1."""
    is_array = isinstance(boxes, np.ndarray)
    if not is_array or boxes.dtype.kind != "f" or boxes.shape[1:] != (4,):
        got = f"{boxes.dtype} {list(boxes.shape)}" if is_array else type(boxes).__name__
        raise ValueError(
            f'"boxes" must be float32 [n, 4] (top, left, bottom, right), got {got}; '
            "convert it in the source."
        )
    # Pixels divided by a side may miss 1 by their rounding.
    if not ((boxes >= -1e-4) & (boxes <= 1 + 1e-4)).all():
        raise ValueError(
            f'"boxes" holds values in {boxes.min():.6g}..{boxes.max():.6g}; they are '
            "fractions of the image in 0..1: divide pixels by its height and width."
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


def _decode_png(data: bytes) -> np.ndarray:
    # One gray value of a PNG may be clear; OpenCV shows it.
    is_gray = data[25:26] == bytes([_PNG_GRAY])
    if is_gray and any(name == b"tRNS" for name, _ in _chunks(data)):
        return pillow.decode(data, "PNG")
    return _by_opencv(_plain_png(data), "PNG")


def _plain_png(data: bytes, what: str = "PNG") -> bytes:
    """Returns the PNG without what no pixel needs.

    OpenCV prints what it thinks of colour profiles, and takes the first frame of an
    animation for the picture that comes before it. What comes after the picture may be
    cut. Raises UndecodableImage for chunks that are not there and for a size that the
    bytes cannot hold: OpenCV would fill gigabytes before it misses them.
    """
    chunks = list(_chunks(data))
    kept = [whole for name, whole in chunks if name in _PNG_PIXELS]
    if any(len(whole) != 12 + int.from_bytes(whole[:4], "big") for whole in kept):
        raise UndecodableImage(f"{what} is damaged or cut short")
    if kept and len(kept[0]) == 25:
        width, height, bits, kind = struct.unpack(">IIBB", kept[0][8:18])
        check_pixels(height, width, what)
        row = 1 + width * bits * _PNG_SAMPLES.get(kind, 1) // 8
        held = sum(map(len, kept))
        if height * row > _DEFLATE_MOST * held:
            raise UndecodableImage(
                f"{what} is damaged or cut short: {held} bytes of {height} x {width} "
                "pixels"
            )
    if len(kept) == len(chunks) - 1 and chunks[-1][1] == _PNG_END:
        return data
    return b"".join([data[:8], *kept, _PNG_END])


def _by_opencv(data: Encoded, name: str) -> np.ndarray:
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


def _as_it_is(data: Encoded | np.ndarray, channels: int) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise ValueError(
            f"An image file has 1 (gray) or 3 channels (RGB), not {channels}: give "
            f"arrays, uint8 [H, W, {channels}]."
        )
    _check_values(data)
    if data.ndim != 3 or data.shape[-1] != channels or 0 in data.shape:
        raise ValueError(
            f"An image of {channels} channels must be an array [H, W, {channels}] with "
            f"at least one pixel, got {list(data.shape)}."
        )
    return data


def _check_array(image: np.ndarray) -> np.ndarray:
    _check_values(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            "An image array must be [H, W] or [H, W, C] with 1, 3 or 4 channels and "
            f"at least one pixel, got {list(image.shape)}."
        )
    return image


def _check_values(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise ValueError(
            f"An image array must be uint8 in 0..255, got {image.dtype}"
            f"{_describe_values(image)}. Convert it in the source, for values in 0..1 "
            "by np.rint(255 * image).astype(np.uint8)."
        )


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


# Samples of a pixel by colour type, and what a byte of deflate holds at most.
_PNG_SAMPLES, _DEFLATE_MOST = {2: 3, 4: 2, 6: 4}, 1032
# The chunks that the pixels are made of.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_END = bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the name and the whole of each chunk of a PNG; a last one may be cut."""
    start = 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def _without_palette(data: bytes) -> bytes:
    """Returns the same PNG as one of gray values: what were indices of a palette."""
    kept = [data[:8]]
    for name, whole in _chunks(data):
        if name == b"IHDR":
            body = whole[8:-4]
            header = name + body[:9] + bytes([_PNG_GRAY]) + body[10:]
            length, check = struct.pack(">I", len(body)), zlib.crc32(header)
            kept.append(length + header + struct.pack(">I", check))
        elif name in (b"IDAT", b"IEND"):
            kept.append(whole)
    return b"".join(kept)


@dataclasses.dataclass(kw_only=True)
class Decode:
    """Turns encoded bytes or an array into uint8 [H, W, channels]; see `decode`.

    1 channel is gray, 3 are RGB; of another number only arrays [H, W, channels] come.

    A "mask" beside the image becomes integers [H, W]; see `decode_mask`. EXIF's
    orientation is ignored, as big_vision does; "apply" turns image, mask and boxes.
    Let it be the same in `data.ops` and `preprocess`.
    """

    channels: int = 3
    orientation: Orientation = Orientation.IGNORE

    def __post_init__(self):
        check_channels(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return decode_keys(example, self.channels, self.orientation)


def check_channels(op: Any) -> None:
    """Raises ValueError unless `op.channels` is at least 1."""
    if op.channels < 1:
        name = type(op).__name__
        raise ValueError(
            f"{name}.channels={op.channels}: use 1 (gray), 3 (RGB), or as many as the "
            "arrays of a source have."
        )
