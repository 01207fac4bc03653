"""Tells files apart: images that are read, others by first bytes, systems' own."""

import errno
import os
import re
import stat

from PIL import features

# TIFF and AVIF go through Pillow, which may be built without them.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif"),
    *((".tif", ".tiff") if features.check("libtiff") else ()),
    *((".avif",) if features.check("avif") else ()),
)

# What NAS, Windows, macOS, Linux and editors make beside the files of a person. No
# word that could be a class: waste is sorted into "trash" and "recycle".
_SYSTEM = {
    *("@eadir", "#recycle", "@recycle", "#snapshot", "~snapshot", "@tmp"),
    *("@recently-snapshot", "@sharesnap", "@appstore", ".@__thumb"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db"),
    *("thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    *("picasa.ini", "zbthumbnail.info", "lost.dir", "pagefile.sys", "hiberfil.sys"),
    *("__macosx", "icon\r", ".ds_store", ".trash", ".trashes", ".fseventsd"),
    *(".spotlight-v100", ".temporaryitems", "temporary items", ".appledouble"),
    *(".documentrevisions-v100", "network trash folder", "thevolumesettingsfolder"),
    *("lost+found", "aquota.user", "aquota.group", ".directory"),
    *("__pycache__", ".ipynb_checkpoints", ".git", ".svn", ".hg", ".dvc", ".idea"),
    *(".vscode", ".thumbnails", ".cache", "node_modules"),
}
# found.000 of chkdsk, .Trash-1000 of Linux, copies of editors, halves of downloads.
_SYSTEM_PATTERN = re.compile(
    r"found\.\d{3}|\.trash-\d+|\.nfs[0-9a-f]+|\.smbdelete.*|\._.*|~\$.*|.+~|"
    r".*\.(crdownload|part|partial|swp|lnk)|\.~lock\..*",
    re.DOTALL,
)


def is_system(name: str) -> bool:
    """Returns whether systems and editors make files or folders of this name."""
    lower = name.lower()
    return lower in _SYSTEM or _SYSTEM_PATTERN.fullmatch(lower) is not None


def is_image_name(name: str) -> bool:
    """Returns whether the suffix is one of an image that is read."""
    return name.lower().endswith(SUFFIXES)


LINK = "links to nothing"
GONE = "paths that are gone"
# What is no file although its name says so: in words for one, and for several.
_NO_FILES = {
    stat.S_IFIFO: ("a named pipe", "named pipes"),
    stat.S_IFSOCK: ("a socket", "sockets"),
    stat.S_IFCHR: ("a device", "devices"),
    stat.S_IFBLK: ("a device", "devices"),
}
_ERRORS = {
    errno.ELOOP: ("a link that leads to itself", "links that lead to themselves"),
    errno.EACCES: ("no permission to look at it", "paths without permission"),
}


def fault(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Returns why `path` is neither file nor folder, for one and for several, or None.

    Opens nothing: a pipe would wait for a writer.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            return f"a link to {_target(path)}, which is not there", LINK
        return "it is gone", GONE
    except OSError as error:
        said = error.strerror or str(error)
        return _ERRORS.get(error.errno or 0, (said, f"paths with the error {said!r}"))
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return _NO_FILES.get(stat.S_IFMT(mode), ("no file", "paths that are no files"))


def _target(path: str | os.PathLike[str]) -> str:
    return os.fsencode(os.readlink(path)).decode("utf-8", "replace")


# (what, offset, first bytes there); the first that fits.
_FIRST_BYTES = (
    *(("JPEG", 0, b"\xff\xd8\xff"), ("PNG", 0, b"\x89PNG\r\n\x1a\n")),
    *(("GIF", 0, b"GIF8"), ("WebP", 8, b"WEBP"), ("AVIF", 4, b"ftypavi")),
    *(("HEIC", 4, b"ftyphe"), ("HEIC", 4, b"ftypmif1"), ("HEIC", 4, b"ftypmsf1")),
    *(("camera raw", 4, b"ftypcrx"), ("camera raw", 0, b"FUJIFILMCCD-RAW")),
    *(("camera raw", 8, b"CR\x02\0"), ("camera raw", 0, b"IIR")),
    *(("camera raw", 0, b"IIU\0"), ("camera raw", 0, b"FOVb")),
    *(("TIFF", 0, b"II*\0"), ("TIFF", 0, b"MM\0*"), ("TIFF", 0, b"II+\0")),
    *(("Photoshop", 0, b"8BPS"), ("GIMP", 0, b"gimp xcf")),
    *(("JPEG XL", 0, b"\xff\x0a"), ("JPEG XL", 4, b"JXL ")),
    *(("JPEG 2000", 4, b"jP  "), ("JPEG 2000", 0, b"\xff\x4f\xff\x51")),
    *(("OpenEXR", 0, b"v/1\x01"), ("Radiance HDR", 0, b"#?RADIANCE")),
    *(("DICOM", 128, b"DICM"), ("DirectDraw", 0, b"DDS "), ("icon", 0, b"\0\0\1\0")),
    *(("netpbm", 0, b"P%d\n" % kind) for kind in range(1, 8)),
    *(("PDF", 0, b"%PDF"), ("PostScript", 0, b"%!PS"), ("BMP", 0, b"BM")),
    *(("video", 4, b"ftyp"), ("video", 8, b"AVI "), ("video", 0, b"\x1aE\xdf\xa3")),
    *(("archive", 0, b"PK\x03\x04"), ("archive", 0, b"\x1f\x8b")),
    *(
        ("archive", 257, b"ustar"),
        ("archive", 0, b"7z\xbc\xaf"),
        ("archive", 0, b"Rar!"),
    ),
    *(
        ("HDF5", 0, b"\x89HDF"),
        ("numpy array", 0, b"\x93NUMPY"),
        ("Parquet", 0, b"PAR1"),
    ),
)
_RAW = (".dng", ".nef", ".arw", ".cr2", ".cr3", ".orf", ".rw2", ".pef", ".srw", ".raf")
_READ = {
    **{"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WebP": ".webp", "BMP": ".bmp"},
    **{"TIFF": ".tif", "AVIF": ".avif"},
}
_MAGICK = "magick mogrify -format png"
# What to do about a kind, IN being one file.
_CONVERT = {
    "HEIC": "convert them: heif-convert IN OUT.jpg, or magick mogrify -format jpg IN",
    "camera raw": "develop them: darktable-cli IN OUT.jpg, or dcraw -c -w IN",
    "SVG": "draw them: rsvg-convert -w 512 IN -o OUT.png",
    "Photoshop": "flatten them: magick 'IN[0]' OUT.png",
    "JPEG XL": "convert them: djxl IN OUT.png",
    "video": "take out pictures: ffmpeg -i IN -vf fps=1 OUT_%05d.jpg",
    "archive": "unpack them into class folders",
    **{
        kind: f"convert them: {_MAGICK} IN"
        for kind in (
            *("GIMP", "JPEG 2000", "OpenEXR", "Radiance HDR", "DICOM", "DirectDraw"),
            *("icon", "netpbm", "PDF", "PostScript"),
        )
    },
}


def first_bytes(path: str) -> str:
    """Returns what a left-out file is by its first bytes and what to do, or ""."""
    if fault(path) is not None or not os.path.isfile(path):
        return ""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not head:
        return "empty"
    kind = _kind_of(head, os.path.splitext(path)[1].lower())
    if kind in _READ:
        if _READ[kind] in SUFFIXES:
            return f"{kind} by its first bytes; rename them to end in {_READ[kind]}"
        return f"{kind}, which the installed Pillow does not read; convert them to PNG"
    if kind in _CONVERT:
        return f"{kind}, which is not read; {_CONVERT[kind]}"
    return kind


def _kind_of(head: bytes, suffix: str) -> str:
    if b"<svg" in head:
        return "SVG"
    for kind, offset, magic in _FIRST_BYTES:
        if head[offset : offset + len(magic)] == magic:
            return "camera raw" if kind == "TIFF" and suffix in _RAW else kind
    return ""
