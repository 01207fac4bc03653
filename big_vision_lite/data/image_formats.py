"""The format of a file by its first bytes, and what to do if it is not read."""

from big_vision_lite.data.undecodable import UndecodableImage

Encoded = bytes | bytearray | memoryview

# Formats that are read, and their suffix.
READ = {
    **{"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "GIF": ".gif", "BMP": ".bmp"},
    **{"TIFF": ".tif", "AVIF": ".avif"},
}
# Bytes that suffice to tell formats apart.
HEAD = 512
# (format, offset, bytes there); the first that fits.
_FIRST_BYTES = (
    *(("JPEG", 0, b"\xff\xd8\xff"), ("PNG", 0, b"\x89PNG\r\n\x1a\n")),
    *(("GIF", 0, b"GIF87a"), ("GIF", 0, b"GIF89a"), ("WebP", 8, b"WEBP")),
    *(("AVIF", 4, b"ftypavif"), ("AVIF", 4, b"ftypavis")),
    *(("HEIC", 4, b"ftyphe"), ("HEIC", 4, b"ftypmif1"), ("HEIC", 4, b"ftypmsf1")),
    *(("camera raw", 4, b"ftypcrx"), ("camera raw", 0, b"FUJIFILMCCD-RAW")),
    *(("camera raw", 8, b"CR\x02\0"), ("camera raw", 0, b"IIR")),
    *(("camera raw", 0, b"IIU\0"), ("camera raw", 0, b"FOVb")),
    *(("TIFF", 0, b"II*\0"), ("TIFF", 0, b"MM\0*")),
    *(("TIFF", 0, b"II+\0"), ("TIFF", 0, b"MM\0+")),
    *(("Photoshop", 0, b"8BPS"), ("GIMP", 0, b"gimp xcf")),
    *(("JPEG XL", 0, b"\xff\x0a"), ("JPEG XL", 4, b"JXL ")),
    *(("JPEG 2000", 4, b"jP  "), ("JPEG 2000", 0, b"\xff\x4f\xff\x51")),
    *(("OpenEXR", 0, b"v/1\x01"), ("Radiance HDR", 0, b"#?RADIANCE")),
    *(("DICOM", 128, b"DICM"), ("DirectDraw", 0, b"DDS "), ("icon", 0, b"\0\0\1\0")),
    *(("netpbm", 0, b"P%d\n" % kind) for kind in range(1, 8)),
    *(("netpbm", 0, b"P%d " % kind) for kind in range(1, 8)),
    *(("PDF", 0, b"%PDF"), ("PostScript", 0, b"%!PS"), ("QOI", 0, b"qoif")),
    *(("video", 4, b"ftyp"), ("video", 8, b"AVI "), ("video", 0, b"\x1aE\xdf\xa3")),
    *(("archive", 0, b"PK\x03\x04"), ("archive", 0, b"\x1f\x8b")),
    *(("archive", 257, b"ustar"), ("archive", 0, b"7z\xbc\xaf")),
    ("archive", 0, b"Rar!"),
    *(("web page", 0, b"<!DOCTYPE html"), ("web page", 0, b"<html")),
    ("pointer of Git LFS", 0, b"version https://git-lfs"),
    *(("HDF5", 0, b"\x89HDF"), ("numpy array", 0, b"\x93NUMPY")),
    ("Parquet", 0, b"PAR1"),
    # Last: two letters prove little.
    ("BMP", 0, b"BM"),
)
_RAW = (".dng", ".nef", ".arw", ".cr2", ".cr3", ".orf", ".rw2", ".pef", ".srw", ".raf")
_BY_MAGICK = (
    *("GIMP", "JPEG 2000", "OpenEXR", "Radiance HDR", "DICOM", "DirectDraw", "icon"),
    *("netpbm", "PDF", "PostScript", "QOI"),
)
# What to do about a format, IN being one file.
_REMEDIES = {
    "HEIC": "convert them: heif-convert IN OUT.jpg, or magick mogrify -format jpg IN",
    "camera raw": "develop them: darktable-cli IN OUT.jpg, or dcraw -c -w IN",
    "SVG": "draw them: rsvg-convert -w 512 IN -o OUT.png",
    "Photoshop": "flatten them: magick 'IN[0]' OUT.png",
    "JPEG XL": "convert them: djxl IN OUT.png",
    "video": "take out pictures: ffmpeg -i IN -vf fps=1 OUT_%05d.jpg",
    "archive": "unpack them into class folders",
    "web page": "download the images again",
    "pointer of Git LFS": "fetch the images: git lfs pull",
    **dict.fromkeys(_BY_MAGICK, "convert them: magick mogrify -format png IN"),
}


def kind_of(head: Encoded, suffix: str = "") -> str:
    """Returns the format that the first `HEAD` bytes show, "" if none is known.

    The suffix of the file tells camera raw from TIFF, which begins alike.
    """
    head = bytes(head[:HEAD])
    if b"<svg" in head:
        return "SVG"
    for kind, offset, magic in _FIRST_BYTES:
        if head[offset : offset + len(magic)] == magic:
            return "camera raw" if kind == "TIFF" and suffix in _RAW else kind
    return ""


def not_read(kind: str) -> str:
    """Returns that a format is not read and what to do about it; `kind` if unknown."""
    return (
        f"{kind}, which is not read; {_REMEDIES[kind]}" if kind in _REMEDIES else kind
    )


def format_of(data: Encoded) -> str:
    """Returns the name of a format in `READ`; raises UndecodableImage for others."""
    if not data:
        raise UndecodableImage("0 bytes: the file is empty")
    kind = kind_of(data)
    if kind in READ:
        return kind
    if kind in _REMEDIES:
        raise UndecodableImage(not_read(kind))
    raise UndecodableImage(
        "not a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF: the first bytes are "
        f"{bytes(data[:8])!r}{kind and f' ({kind})'}"
    )
