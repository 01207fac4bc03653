"""Labels of images from the cells of a table: classes, flags or numbers."""

import dataclasses
import enum
import logging
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from big_vision_lite.data.sources import contents
from big_vision_lite.data.sources.table_file import Columns
from big_vision_lite.messages import did_you_mean, some

logger = logging.getLogger(__name__)
# A level of its own, because the command line silences libraries by the root logger.
logger.setLevel(logging.WARNING)

FLAGS = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0}
LARGEST = float(np.finfo(np.float32).max)
FILL = "fill them, or remove these rows"


class LabelKind(enum.StrEnum):
    """What the label columns of a table hold.

    CLASS     one column, one class an image
    CLASSES   one column, the names of several classes with a separator between them
    TAGS      one column of words with a separator between them, or nothing, of which
              `Tags` knows the tags
    FLAGS     a column for each class, of 0 and 1 (or true and false, yes and no)
    NUMBERS   a column for each number of a regression
    """

    CLASS = "class"
    CLASSES = "classes"
    TAGS = "tags"
    FLAGS = "flags"
    NUMBERS = "numbers"


@dataclasses.dataclass(kw_only=True)
class Labels:
    """The labels of all rows: class numbers are not yet given.

    `classes` holds the names of each row's classes, `values` float32 [N, C] the flags
    or numbers of the columns `names`.
    """

    classes: list[tuple[str, ...]] | None = None
    values: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def key(self, row: int) -> Any:
        """Returns a value that is equal for rows of equal labels."""
        if self.classes is not None:
            return frozenset(self.classes[row])
        assert self.values is not None, "there are classes or values"
        return self.values[row].tobytes()


def read_labels(
    columns: Columns,
    names: Sequence[str],
    kind: LabelKind,
    separator: str,
    classes: Sequence[str],
) -> Labels:
    """Returns the labels that the columns `names` hold.

    Raises:
        ValueError: cells are empty, or hold no such label; names their lines.
    """
    if kind == LabelKind.FLAGS:
        return Labels(values=_flags(columns, names), names=tuple(names))
    if kind == LabelKind.NUMBERS:
        return Labels(values=_numbers(columns, names), names=tuple(names))
    (name,) = names
    if kind == LabelKind.CLASS:
        return Labels(classes=_class(columns, name, classes))
    if kind == LabelKind.TAGS:
        return Labels(classes=_tags(columns, name, separator))
    return Labels(classes=_classes(columns, name, separator))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns class names sorted; as numbers where all are numbers."""
    return tuple(contents.in_order(set(names)))


def pinned(names: Iterable[str]) -> tuple[str, ...]:
    """Returns given class names as those of a table are: with one form of accents."""
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def numbered(
    held: Sequence[tuple[str, ...]], class_names: Sequence[str], what: str
) -> list[tuple[int, ...]]:
    """Returns the labels of the classes that each image has.

    `what` names the images in messages. Warns of classes without images.

    Raises:
        ValueError: a class is not among `class_names`.
    """
    index = {name: place for place, name in enumerate(class_names)}
    found = {name for names in held for name in names}
    unknown = [name for name in in_order(found) if name not in index]
    if unknown:
        raise ValueError(
            f"{what} has {len(unknown)} classes unknown to training: {some(unknown)}; "
            f"it knows {some(class_names)}. Correct these rows, or train with such "
            f"images.{did_you_mean(unknown[0], class_names)}"
        )
    missing = [name for name in class_names if name not in found]
    if missing:
        logger.warning(
            "%s has %d of the %d train classes (missing: %s); indices follow train.",
            *(what, len(class_names) - len(missing), len(class_names), some(missing)),
        )
    return [tuple(index[name] for name in names) for names in held]


def number(text: str) -> float | None:
    """Returns the finite number that a text writes, None if it writes none."""
    try:
        value = float(text)
    except ValueError:
        return None
    # Python would read 1_000 as a thousand.
    return value if math.isfinite(value) and "_" not in text else None


def is_empty(cell: Any) -> bool:
    """Returns whether a cell holds nothing: a text of spaces, or a null."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _filled(columns: Columns, name: str) -> list[Any]:
    columns.check(name, lambda cell: not is_empty(cell), "are empty", FILL)
    return columns.cells[name]


def _class(
    columns: Columns, name: str, classes: Sequence[str]
) -> list[tuple[str, ...]]:
    cells = _filled(columns, name)
    columns.check(
        name,
        lambda cell: _word(cell) is not None,
        "are no name of a class",
        'write a word or a whole number; several classes an image are kind="classes"',
    )
    words = [str(_word(cell)) for cell in cells]
    values = [number(word) for word in dict.fromkeys(words)]
    fractions = [x for x in values if x is not None and x % 1]
    if not classes and fractions and None not in values:
        raise ValueError(
            f'{columns.path}: column "{name}" holds numbers ({some(words, 3)}): '
            'kind="numbers" trains a regression. If they are the names of classes, '
            f"pin them: classes=({some(map(repr, in_order(words)), 3)})."
        )
    _warn_of_spellings(columns, name, words)
    return [(word,) for word in words]


def _classes(columns: Columns, name: str, separator: str) -> list[tuple[str, ...]]:
    nothing = f"an image of no class has a lone {separator!r}, in JSON []"
    columns.check(
        name, lambda cell: not is_empty(cell), "are empty", f"{FILL}; {nothing}"
    )
    found = _tags(columns, name, separator)
    texts = [cell for cell in columns.cells[name] if isinstance(cell, str)]
    if texts and not any(separator in text for text in texts):
        _refuse_separator(columns, name, separator, _others(texts))
    _warn_of_spellings(columns, name, [word for words in found for word in words])
    return found


def _tags(columns: Columns, name: str, separator: str) -> list[tuple[str, ...]]:
    """Returns the words between separators; none of an empty cell."""
    columns.check(
        name,
        lambda cell: is_empty(cell) or _words(cell, separator) is not None,
        "are no names of classes",
        f"write words with {separator!r} between them",
    )
    cells = columns.cells[name]
    texts = [cell for cell in cells if isinstance(cell, str)]
    others = _others(texts)
    # One tag an image needs no separator.
    needed = texts and 2 * max(others.values()) >= len(texts)
    if needed and not any(separator in text for text in texts):
        _refuse_separator(columns, name, separator, others)
    return [() if is_empty(cell) else _words(cell, separator) or () for cell in cells]


def _others(texts: Sequence[str]) -> dict[str, int]:
    """Returns the number of texts that hold each character that may be a separator."""
    return {c: sum(c in text.strip() for text in texts) for c in ("|", ";", ",", " ")}


def _refuse_separator(
    columns: Columns, name: str, separator: str, others: dict[str, int]
) -> NoReturn:
    most = max(others, key=lambda c: others[c])
    hint = f"; {others[most]} hold {most!r}: separator={most!r}" * (others[most] > 0)
    raise ValueError(
        f'{columns.path}: not one cell of column "{name}" holds the separator '
        f'{separator!r}{hint}. One class an image is kind="class".'
    )


def _flags(columns: Columns, names: Sequence[str]) -> np.ndarray:
    for name in names:
        _filled(columns, name)
        columns.check(
            name,
            lambda cell: _flag(cell) is not None,
            "are no flag",
            f"write {', '.join(FLAGS)}; numbers to predict are kind=numbers",
        )
    cells = [[_flag(cell) for cell in columns.cells[name]] for name in names]
    return np.array(cells, np.float32).T


def _numbers(columns: Columns, names: Sequence[str]) -> np.ndarray:
    for name in names:
        _filled(columns, name)
        columns.check(
            name,
            lambda cell: _finite(cell) is not None,
            "are no finite number of float32",
            "write numbers as 3.5 or 1e-3, with a point and without units",
        )
    cells = [[_finite(cell) for cell in columns.cells[name]] for name in names]
    return np.array(cells, np.float64).T.astype(np.float32)


def _word(cell: Any) -> str | None:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        # What a column of whole numbers becomes where others are missing.
        return str(int(cell))
    if isinstance(cell, int | float):
        return None if cell != cell else str(cell)
    if isinstance(cell, str):
        return unicodedata.normalize("NFC", cell.strip())
    return None


def _words(cell: Any, separator: str) -> tuple[str, ...] | None:
    parts = cell.split(separator) if isinstance(cell, str) else cell
    if not isinstance(parts, list):
        parts = [parts]
    words = [_word(part) for part in parts]
    if None in words:
        return None
    return tuple(dict.fromkeys(word for word in words if word))


def _flag(cell: Any) -> float | None:
    return FLAGS.get(_word(cell) or "", FLAGS.get(str(cell).strip().lower()))


def _finite(cell: Any) -> float | None:
    if isinstance(cell, bool | list | dict):
        return None
    value = number(str(cell))
    return None if value is None or abs(value) > LARGEST else value


def _warn_of_spellings(columns: Columns, name: str, words: Iterable[str]) -> None:
    """Warns of classes whose names differ as "cat" and "Cat" do, or "1" and "01"."""
    alike: dict[Any, list[str]] = {}
    for word in in_order(words):
        value = number(word)
        key = word.casefold() if value is None else value
        alike.setdefault(key, []).append(word)
    for spellings in alike.values():
        if len(spellings) > 1:
            logger.warning(
                '%s: column "%s" has the classes %s; if they are one class, write it '
                "in one way.",
                *(columns.path, name, some(map(repr, spellings))),
            )
