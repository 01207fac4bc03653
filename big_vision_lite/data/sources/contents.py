"""Walks a folder: the images below it, what else is there, what cannot be opened.

Training and prediction list files by this code alone.
"""

import collections
import dataclasses
import decimal
import functools
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from big_vision_lite.data.sources import file_kinds
from big_vision_lite.messages import did_you_mean, some

# Relative paths of the images of each class, both sorted.
Files = dict[str, list[str]]

SYSTEM = "files and folders of systems and editors"
HIDDEN = "hidden files and folders"
BY_SUFFIX = "files"
NO_SUFFIX = "files without a suffix"
LOOP = "links to a folder above"
UNOPENED = "folders that cannot be opened"
NO_CLASS = "images outside a class folder"
NO_SPLIT = "images outside a split folder"
EMPTY = "folders without an image"
OTHER_FOLDER = "folders that are no split"


@dataclasses.dataclass
class LeftOut:
    """What a folder holds beside the images that are read.

    `others` {kind: paths counted, first path by name}; `faults` {path: (kind, reason)}
    are those that a person would miss: images by their names that are no files, and
    folders that cannot be opened.
    """

    others: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    faults: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, path: str, count: int = 1) -> None:
        """Counts paths of a kind."""
        # The first by name: folders are listed in any order.
        before, first = self.others.get(kind, (0, path))
        self.others[kind] = (before + count, min(first, path))

    def count(self, kind: str) -> int:
        """Returns how many paths of a kind there are."""
        return self.others.get(kind, (0, ""))[0]

    def __str__(self) -> str:
        kinds = [f"{n} {kind}" for kind, (n, _) in sorted(self._all().others.items())]
        return ", ".join(kinds) or "nothing"

    def lines(self, root: str, faults: bool = True) -> list[str]:
        """Returns a line a kind: how many, one example below `root`, what to do."""
        lines = []
        found = self._all() if faults else self
        for kind, (count, path) in sorted(found.others.items()):
            example = shown(os.path.relpath(path, root))
            by_suffix = kind == NO_SUFFIX or kind.endswith(f" {BY_SUFFIX}")
            known = file_kinds.first_bytes(path) if by_suffix else ""
            lines.append(f"{count:,} {kind}, such as {example}{known and f': {known}'}")
        return lines

    def _all(self) -> "LeftOut":
        whole = LeftOut(dict(self.others))
        for path, (kind, _) in self.faults.items():
            whole.add(kind, path)
        return whole


def merged(parts: Iterable[LeftOut]) -> LeftOut:
    """Returns the sum of what several folders hold."""
    whole = LeftOut()
    for part in parts:
        whole.faults.update(part.faults)
        for kind, (count, path) in part.others.items():
            whole.add(kind, path, count)
    return whole


def check_folder(root: Path) -> None:
    """Raises OSError that says what is at `root` instead of a folder."""
    if os.path.isdir(root):
        try:
            with os.scandir(root):
                return
        except OSError as error:
            raise type(error)(
                f"the folder {root} cannot be opened: {error.strerror}. Give yourself "
                f"the right to read it: chmod u+rx {root}"
            ) from error
        return
    if (wrong := file_kinds.fault(root)) and wrong[1] != file_kinds.GONE:
        raise FileNotFoundError(f"{root} is no folder of images: {wrong[0]}.")
    if os.path.exists(root):
        raise NotADirectoryError(
            f"{root} is a file, not a folder of images; unpack it, and name the folder."
        )
    parent = next(p for p in root.absolute().parents if p.is_dir())
    name = root.absolute().relative_to(parent).parts[0]
    there = [entry.name for entry in folders(parent)]
    raise FileNotFoundError(
        f"there is no folder {root}: {parent} has no {name!r}; folders there: "
        f"{some(there)}.{did_you_mean(name, there)}"
    )


def class_folders(root: Path) -> list[str]:
    """Names the class folders of `root` that hold at least one image, sorted."""
    return in_order({class_name(f.name) for f in folders(root) if has_image(f)})


def in_order(names: Collection[str]) -> list[str]:
    """Sorts the names of classes as text, or as numbers where all of them are."""
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        return sorted(names, key=lambda name: (decimal.Decimal(name), name))
    return sorted(names)


def list_images(
    folder: Path, left_out: LeftOut, labelled: bool = True, root: Path | None = None
) -> Files:
    """Returns the images of each class folder, as paths relative to `root` or `folder`.

    Those that are not `labelled` are all of the class "".
    """
    start = len(os.path.join(folder, ""))
    prefix = len(os.path.join(root or folder, ""))
    files: Files = collections.defaultdict(list)
    for path in walk(folder, left_out):
        end = path.find(os.sep, start)
        if labelled and end < 0:
            left_out.add(NO_CLASS, path)
        else:
            name = class_name(path[start:end]) if labelled else ""
            files[name].append(path[prefix:])
    return {name: sorted(files[name]) for name in sorted(files)}


@functools.lru_cache
def class_name(folder: str) -> str:
    """Returns the folder's name; one spelling of accents, as file systems differ."""
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the class folder {os.fsencode(folder)!r} has a name that is not "
            "UTF-8; rename it."
        ) from error
    return unicodedata.normalize("NFC", folder)


def walk(
    folder: str | os.PathLike[str],
    left_out: LeftOut,
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[str]:
    """Yields the images below `folder`; links are followed, loops of them are not."""
    try:
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in above:
            left_out.add(LOOP, os.fspath(folder))
            return
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError as error:
        reason = f"the folder cannot be opened: {error.strerror or error}"
        left_out.faults[os.fspath(folder)] = (UNOPENED, reason)
        return
    for entry in entries:
        if is_image(entry):  # first: nearly all of a large set
            yield entry.path
        elif is_folder(entry) and not is_aside(entry.name):
            yield from walk(entry, left_out, (*above, (info.st_dev, info.st_ino)))
        elif reason := _missed(entry):
            left_out.faults[entry.path] = (kind_of(entry), reason)
        else:
            left_out.add(kind_of(entry), entry.path)


def folders(root: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Returns the folders of `root`, sorted, without hidden ones and systems' own."""
    with os.scandir(root) as entries:
        found = [e for e in entries if is_folder(e) and not is_aside(e.name)]
    return sorted(found, key=lambda entry: entry.name)


def has_image(folder: os.DirEntry[str]) -> bool:
    """Returns whether at least one image lies below `folder`.

    Raises PermissionError if that cannot be known.
    """
    left_out = LeftOut()
    if next(walk(folder, left_out), None) is not None:
        return True
    check_opened(left_out)
    return False


def check_opened(left_out: LeftOut) -> None:
    """Raises PermissionError for folders that would be missed without a word."""
    found = left_out.faults
    closed = sorted(p for p, (kind, _) in found.items() if kind == UNOPENED)
    if closed:
        path = shown(closed[0])
        more = f" ({len(closed)} such folders)" * (len(closed) > 1)
        raise PermissionError(
            f"{path}: {found[closed[0]][1]}{more}. Give yourself the right to read "
            f"it, chmod -R u+rX {path}, or move it away."
        )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether `entry` is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False  # `fault` says what it is: a link to itself, no permission


def is_image(entry: os.DirEntry[str]) -> bool:
    """Returns whether `entry` is a file with the suffix of an image."""
    visible = not entry.name.startswith(".")
    return visible and file_kinds.is_image_name(entry.name) and not _odd(entry)


def _odd(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.is_file()
    except OSError:
        return True


def is_aside(name: str) -> bool:
    """Returns whether a name is hidden, or one that systems make."""
    return name.startswith(".") or file_kinds.is_system(name)


def kind_of(entry: os.DirEntry[str]) -> str:
    """Returns the kind of what is left out: hidden, no file, or by its suffix."""
    if file_kinds.is_system(entry.name):
        return SYSTEM
    if entry.name.startswith("."):
        return HIDDEN
    if _odd(entry) and (wrong := file_kinds.fault(entry)):
        return wrong[1]
    suffix = os.path.splitext(entry.name)[1].lower()
    return f"{written(suffix)} {BY_SUFFIX}" if suffix else NO_SUFFIX


def _missed(entry: os.DirEntry[str]) -> str:
    """Returns why an image by its name is left out, or "" if nobody would miss it."""
    named = file_kinds.is_image_name(entry.name) and not is_aside(entry.name)
    wrong = file_kinds.fault(entry) if named else None
    return wrong[0] if wrong else ""


def read_file(path: str) -> bytes:
    """Returns the bytes of a file; raises OSError for a pipe, which would wait."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{written(path)} is no file")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def shown(path: str) -> str:
    """Returns a path for the terminal: as `written`, on one line."""
    return "".join(" " if ord(c) < 32 or ord(c) == 127 else c for c in written(path))


# What `written` must escape, so that it can be taken back.
_ESCAPED = re.compile("%(?=[0-9A-Fa-f]{2})|[\udc80-\udcff]")


def written(path: str) -> str:
    """Returns a path as UTF-8 text that `urllib.parse.unquote_to_bytes` takes back.

    A name is as it is, but for bytes that are not UTF-8, and a % before two hexadecimal
    digits: these become %XX.
    """
    return _ESCAPED.sub(lambda found: f"%{os.fsencode(found[0])[0]:02X}", path)
