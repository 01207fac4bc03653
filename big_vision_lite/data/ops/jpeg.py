"""Decodes JPEGs: missing picture data is damage, an odd header is none.

libjpeg tells its first warning only, be it about a version number or about data that
is missing. So what it warns of and no pixel needs is taken out of the bytes, and the
rest is decoded again: then the first warning is about the picture.
"""

import re

import numpy as np
import simplejpeg

from big_vision_lite.data.image_formats import Encoded
from big_vision_lite.data.ops import pillow
from big_vision_lite.data.ops.jpeg_parts import (
    FRAMES,
    SEQUENTIAL,
    SOI,
    SOS,
    Part,
    parts,
    what_is_missing,
)
from big_vision_lite.data.undecodable import UndecodableImage, check_pixels

APP0, APP14, COMMENT = 0xE0, 0xEE, 0xFE


def decode_jpeg(data: Encoded, channels: int) -> np.ndarray:
    """Returns uint8 [H, W, channels]; colours of an odd sampling stay for 1, too.

    Raises UndecodableImage where data is missing.
    """
    colours = "GRAY" if channels == 1 else "RGB"
    try:
        return _strictly(data, colours)
    except _OddSampling:
        plain = bytes(data)
    except ValueError as error:
        if isinstance(error, UndecodableImage):
            raise
        plain = tidied(bytes(data), _count_of_padding(str(error)))
        if plain == data:
            raise _damaged(error) from error
    try:
        return _strictly(plain, colours)
    except _OddSampling:
        return _by_pillow(plain)
    except ValueError as error:
        if isinstance(error, UndecodableImage):
            raise
        raise _damaged(error) from error


class _OddSampling(Exception):
    """TurboJPEG knows no name for the sampling factors; libjpeg decodes them."""


def _strictly(data: Encoded, colours: str) -> np.ndarray:
    """Decodes; raises ValueError with libjpeg's first warning, _OddSampling."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError as error:
        raise _OddSampling from error
    except ValueError as error:
        if "subsampling" in str(error):
            raise _OddSampling from error
        raise
    check_pixels(int(height), int(width), "JPEG")
    try:
        return simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        # Padding bytes between picture and end marker, as some cameras write them.
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            raise
    return simplejpeg.decode_jpeg(data, colours, strict=False)


def _damaged(error: Exception) -> UndecodableImage:
    return UndecodableImage(f"JPEG is damaged or cut short: {error}")


def _count_of_padding(warning: str) -> int:
    found = re.search(r"(\d+) extraneous bytes before marker", warning)
    return int(found[1]) if found else 0


def tidied(data: bytes, padding: int = 0) -> bytes:
    """Returns the JPEG without what libjpeg warns of though no pixel needs it.

    That are bytes between the parts of the header, versions, profiles, codes of colours
    that are taken for YCbCr or YCCK anyway, and the spectrum that a sequential scan
    names. Of zeros after a scan `padding` are left out.
    """
    found = list(parts(data))
    frames = [part for part in found if part.marker in FRAMES]
    if not frames or len(frames[0].body) < 6:
        return data
    components = frames[0].body[5]
    sequential = frames[0].marker in SEQUENTIAL
    kept = [bytes([0xFF, SOI])]
    for part in found:
        marker, body, scan = part.marker, part.body, part.scan
        if marker == APP0 and body.startswith(b"JFIF\0"):
            body = body[:5] + b"\1\1" + body[7:]
        elif marker == APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            known, assumed = ((0, 2), 2) if components == 4 else ((0, 1), 1)
            if body[11] not in known:
                body = body[:11] + bytes([assumed]) + body[12:]
        elif APP0 <= marker <= APP0 + 15 or marker == COMMENT:
            continue
        elif marker == SOS:
            if sequential and len(body) > 3:
                body = body[:-3] + bytes((0, 63, 0))
            scan = _unpadded(scan, padding)
        kept.append(Part(marker=marker, body=body, scan=scan).joined())
    return b"".join(kept)


def _unpadded(scan: bytes, padding: int) -> bytes:
    if not padding or not scan.endswith(bytes(padding)):
        return scan
    scan = scan[:-padding]
    return scan + b"\0" if scan.endswith(b"\xff") else scan  # of the stuffed pair


def _by_pillow(data: bytes) -> np.ndarray:
    # Pillow passes over libjpeg's warnings, so that the codes are counted before.
    if reason := what_is_missing(list(parts(data))):
        raise UndecodableImage(f"JPEG is damaged or cut short: {reason}")
    return pillow.decode(data, "JPEG")
