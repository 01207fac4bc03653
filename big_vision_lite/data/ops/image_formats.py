"""The format of a file by its first bytes."""

from big_vision_lite.data.ops.undecodable import UndecodableImage

Encoded = bytes | bytearray | memoryview

# First bytes of a file, from which place on. WebP and AVIF begin with a length.
FORMATS = {
    (0, b"\xff\xd8\xff"): "JPEG",
    (0, b"\x89PNG\r\n\x1a\n"): "PNG",
    (8, b"WEBP"): "WebP",
    (0, b"GIF87a"): "GIF",
    (0, b"GIF89a"): "GIF",
    (0, b"BM"): "BMP",
    (0, b"II*\0"): "TIFF",
    (0, b"MM\0*"): "TIFF",
    (0, b"II+\0"): "TIFF",
    (0, b"MM\0+"): "TIFF",
    (4, b"ftypavif"): "AVIF",
    (4, b"ftypavis"): "AVIF",
}
# What is met in folders of images and not read.
OTHERS = {
    (4, b"ftyphei"): "HEIC, as phones write it",
    (4, b"ftyphev"): "HEIC, as phones write it",
    (4, b"ftypmif1"): "HEIF",
    (4, b"ftyp"): "a film (MP4)",
    (4, b"jP  "): "JPEG 2000",
    (0, b"\xff\x4f\xff\x51"): "JPEG 2000",
    (4, b"JXL "): "JPEG XL",
    (0, b"\xff\x0a"): "JPEG XL",
    (0, b"8BPS"): "a Photoshop file",
    (0, b"%PDF"): "PDF",
    (0, b"<svg"): "SVG",
    (0, b"<!DOCTYPE html"): "a web page",
    (0, b"<html"): "a web page",
    (0, b"<?xml"): "XML, such as SVG",
    (0, b"\0\0\1\0"): "an icon (ICO)",
    (0, b"qoif"): "QOI",
    (0, b"v/1\1"): "OpenEXR",
    (0, b"#?RADIANCE"): "Radiance HDR",
    (0, b"DDS "): "DDS",
    (0, b"PK\3\4"): "a zip archive",
    (0, b"\x1f\x8b"): "a gzip archive",
    (0, b"version https://git-lfs"): "a pointer of Git LFS (git lfs pull fetches it)",
    **{(0, b"P%d%c" % (n, c)): "Netpbm" for n in range(1, 8) for c in b"\n "},
}


def format_of(data: Encoded) -> str:
    """Returns the name of a format that is read; raises UndecodableImage for others."""
    head = bytes(data[:32])
    if not head:
        raise UndecodableImage("0 bytes: the file is empty")
    for starts, name in FORMATS.items():
        if _begins(head, starts):
            return name
    other = next((name for starts, name in OTHERS.items() if _begins(head, starts)), "")
    what = f"{other}, not read: convert it to PNG or JPEG; " if other else ""
    raise UndecodableImage(
        f"{what}not a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF: the first bytes are "
        f"{head[: 12 if other else 8]!r}"
    )


def _begins(head: bytes, starts: tuple[int, bytes]) -> bool:
    place, magic = starts
    return head[place : place + len(magic)] == magic
