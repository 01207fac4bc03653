"""Tells files apart: images that are read, others by first bytes, systems' own."""

import errno
import os
import re
import stat

from PIL import features

from big_vision_lite.data import image_formats

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


def first_bytes(path: str) -> str:
    """Returns what a left-out file is by its first bytes and what to do, or ""."""
    if fault(path) is not None or not os.path.isfile(path):
        return ""
    try:
        with open(path, "rb") as file:
            head = file.read(image_formats.HEAD)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not head:
        return "empty"
    kind = image_formats.kind_of(head, os.path.splitext(path)[1].lower())
    suffix = image_formats.READ.get(kind)
    if suffix is None:
        return image_formats.not_read(kind)
    if suffix in SUFFIXES:
        return f"{kind} by its first bytes; rename them to end in {suffix}"
    return f"{kind}, which the installed Pillow does not read; convert them to PNG"
