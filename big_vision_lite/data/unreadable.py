"""Lists images whose bytes do not decode; a run skips a few and stops at many."""

import dataclasses
from collections.abc import Iterable

from etils import epath

from big_vision_lite.runtime import files

# Above this share of distinct images a run stops: the set is broken, not a file.
LARGEST_SHARE = 0.001


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """One example whose complete bytes do not decode."""

    index: int
    name: str
    reason: str

    @property
    def line(self) -> str:
        """Returns a line of the list: index, name and reason, separated by tabs."""
        fields = (str(self.index), self.name, self.reason)
        line = "\t".join(" ".join(field.split()) for field in fields) + "\n"
        # File names on Linux are bytes, not always UTF-8.
        return line.encode("utf-8", "backslashreplace").decode("utf-8")


class UnreadableImages:
    """Counts distinct unreadable images of a run, over its restarts and its hosts.

    Every process writes its own file and reads those of all: process 0 writes `path`,
    process 3 `<stem>_3<suffix>` beside it. Without a path only this process and this
    run count. Raises ValueError for a file of another form.
    """

    def __init__(self, total: int, path: epath.Path | None = None, process: int = 0):
        self._total = total
        self._list = path
        self._own = path
        if path is not None and process > 0:
            self._own = path.with_name(f"{path.stem}_{process}{path.suffix}")
        self._mine = {} if self._own is None else _read(self._own)
        self._found = self._mine | self._others()

    @property
    def count(self) -> int:
        """Returns the number of distinct unreadable images known to this process."""
        return len(self._found)

    def add(self, found: Iterable[Unreadable]) -> None:
        """Records what a batch skipped; raises ValueError above 0.1 % of the images."""
        found = list(found)
        if not found:
            return
        new = {bad.index: bad for bad in found if bad.index not in self._found}
        if new:
            self._mine |= new
            self._write()
            self._found |= new | self._others()
        if self.count > LARGEST_SHARE * self._total:
            first = list(self._found.values())[:5]
            rows = "".join(f"\n  {bad.name}: {bad.reason}" for bad in first)
            listed = "" if self._list is None else f"\nAll of them: {self._list}."
            raise ValueError(
                f"{self.count} of {self._total} images do not decode "
                f"({self.count / self._total:.3%}); at most {LARGEST_SHARE:.1%} are "
                f"skipped. The first:{rows}{listed}\nAudit the set with "
                "python tools/check_dataset.py, then repair or remove these files."
            )

    def message(self) -> str:
        """Returns what to tell the user, or "" when every image decoded."""
        if not self.count:
            return ""
        images = "image" if self.count == 1 else "images"
        listed = "" if self._list is None else f", list in {self._list}"
        share = f"{100 * self.count / self._total:.3f} %"
        return f"Skipped {self.count} unreadable {images} ({share}){listed}."

    def _others(self) -> dict[int, Unreadable]:
        if self._list is None or not self._list.parent.exists():
            return {}
        found = {}
        pattern = f"{self._list.stem}*{self._list.suffix}"
        for path in sorted(self._list.parent.glob(pattern)):
            if path != self._own:
                found |= _read(path)
        return found

    def _write(self) -> None:
        # Rewritten whole and renamed: no half line after a kill, and object stores
        # cannot append. The list is short: about a thousandth of the images at most.
        if self._own is None:
            return
        with files.writing(self._own):
            self._own.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(bad.line for bad in self._mine.values())
            files.replace(self._own, text)


def _read(path: epath.Path) -> dict[int, Unreadable]:
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) != 3 or not fields[0].isdecimal():
            raise ValueError(
                f"{path} is not a list of unreadable images as this program writes it: "
                f"{line[:80]!r}. Delete the file; it is made anew."
            )
        found[int(fields[0])] = Unreadable(int(fields[0]), fields[1], fields[2])
    return found
