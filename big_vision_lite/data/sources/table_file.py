"""Reads columns of a table: CSV, TSV, JSON lines or Parquet, told by the suffix."""

import csv
import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from big_vision_lite.messages import did_you_mean, some

# {suffix: delimiters in the order in which they are tried}.
DELIMITERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SUFFIXES = (*DELIMITERS, *JSON_LINES, *PARQUET)
# A cell of text has at most so many characters.
LONGEST_CELL = 1 << 24


@dataclasses.dataclass(kw_only=True)
class Columns:
    """The `cells` of some columns of a table; an empty one is None or "".

    `places` are the numbers of the lines on which the rows begin, in a Parquet file of
    the rows, counted from 1.
    """

    path: Path
    cells: dict[str, list[Any]]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, rows: Sequence[int], most: int = 5) -> str:
        """Returns the words for rows by number: "lines 3, 9 and 2 more"."""
        word = "row" if self.path.suffix.lower() in PARQUET else "line"
        numbers = some([str(self.places[row]) for row in rows], most)
        return f"{word}{'s' * (len(rows) != 1)} {numbers}"

    def check(
        self,
        column: str,
        is_right: Callable[[Any], bool],
        wrong: str,
        remedy: str,
    ) -> None:
        """Raises ValueError with the places of the cells that are not right.

        The message reads "12 cells of column "price" WRONG ("n/a") (lines ...);
        REMEDY.".
        """
        cells = self.cells[column]
        rows = [row for row, cell in enumerate(cells) if not is_right(cell)]
        if rows:
            wrongs = (cells[row] for row in rows)
            found = list(dict.fromkeys(str(c) for c in wrongs if c is not None))
            shown = f" ({some(map(repr, found), 3)})" if any(found) else ""
            raise ValueError(
                f"{self.path}: {len(rows)} of {len(cells)} cells of column "
                f'"{column}" {wrong}{shown}, {self.at(rows)}; {remedy}.'
            )


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Reads the columns `names` of a table.

    A CSV file is separated by commas, or by ";" or tabs where only these give the
    named columns. Text is UTF-8. Column names lose spaces around them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such table, is damaged, has no rows or lacks a
            column.
        ModuleNotFoundError: the file is Parquet, and pyarrow is not installed.
    """
    _check_file(path)
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        columns = _parquet(path, names)
    elif suffix in JSON_LINES:
        columns = _json_lines(path, _text(path), names)
    else:
        columns = _delimited(path, _text(path), names)
    if not len(columns):
        raise ValueError(f"{path} has column names and no rows; give it some.")
    return columns


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, not a table; name a file in it, or read images in "
            f'class folders by ImageFolder(path="{path}").'
        )
    if not path.exists():
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        tables = sorted(p.name for p in there if p.suffix.lower() in SUFFIXES)
        raise FileNotFoundError(
            f"there is no table {path}; tables in {path.parent}: {some(tables)}."
            f"{did_you_mean(path.name, tables)}"
        )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        remedy = {
            ".json": f"write one object a line: jq -c '.[]' {path} > "
            f"{path.with_suffix('.jsonl')}",
            ".xlsx": "save it as CSV UTF-8",
            ".xls": "save it as CSV UTF-8",
            ".gz": f"unpack it: gunzip {path}",
            ".zip": f"unpack it: unzip {path}",
        }.get(suffix, "rename it to what it is")
        raise ValueError(
            f'{path} ends in "{path.suffix}"; tables are read by suffix: '
            f"{', '.join(SUFFIXES)}. Please {remedy}."
        )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: 0 bytes; give it column names and rows.")


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = "UTF-16" if b"\0" in data else "WINDOWS-1252"
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{data[error.start]:02x} on line {line}); "
            f"convert it, from {name} for example: {_convert(path, name)}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path} holds zero bytes, first on line {line}: it is no text in UTF-8. "
            f"If it is UTF-16: {_convert(path, 'UTF-16LE')}"
        )
    return text


def _convert(path: Path, name: str) -> str:
    return f"iconv -f {name} -t UTF-8 {path} > {path.stem}_utf8{path.suffix}"


def _delimited(path: Path, text: str, names: Sequence[str]) -> Columns:
    delimiters = DELIMITERS[path.suffix.lower()]
    headers = {d: _header(path, text, d) for d in delimiters}
    fitting = [d for d, header in headers.items() if set(names) <= set(header)]
    delimiter = (fitting or delimiters)[0]
    header = headers[delimiter]
    if not fitting:
        # Shown as they would be read if this is the delimiter.
        delimiter = max(delimiters, key=lambda d: len(headers[d]))
        hint = "The first line names the columns."
        _refuse_missing(path, headers[delimiter], names, hint)
    _check_unique(path, header, names)
    wanted = {name: header.index(name) for name in names}
    cells: dict[str, list[Any]] = {name: [] for name in wanted}
    places: list[int] = []
    ragged: dict[int, int] = {}
    for place, row in itertools.islice(_rows(path, text, delimiter), 1, None):
        if len(row) != len(header):
            ragged[place] = len(row)
            continue
        places.append(place)
        for name, index in wanted.items():
            cells[name].append(row[index])
    if ragged:
        shown = some((f"line {p} has {n}" for p, n in ragged.items()), 3)
        raise ValueError(
            f"{path}: {len(ragged)} rows have another number of cells than the "
            f"{len(header)} columns: {shown}. Repair them, or put cells that hold "
            f'{delimiter!r} in quotes: "a{delimiter}b".'
        )
    return Columns(path=path, cells=cells, places=places)


def _header(path: Path, text: str, delimiter: str) -> list[str]:
    for _, row in _rows(path, text, delimiter):
        return [name.strip() for name in row]
    raise ValueError(f"{path} is empty; give it column names and rows.")


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row begins and its cells, without empty lines."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=True,
        strict=True,
    )
    end = 0
    try:
        for row in reader:
            begin, end = end + 1, reader.line_num
            if row:
                yield begin, row
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row that begins on line {end + 1} cannot be read ({error}); "
            'repair its quotes: a quote in quotes is written twice, "".'
        ) from error


def _json_lines(path: Path, text: str, names: Sequence[str]) -> Columns:
    cells: dict[str, list[Any]] = {name: [] for name in names}
    places: list[int] = []
    known: dict[str, None] = {}
    # Not by splitlines: strings may hold other characters that end lines.
    for place, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _object(path, place, line)
        known.update(dict.fromkeys(found))
        places.append(place)
        for name in names:
            cells[name].append(found.get(name))
    if not places:
        raise ValueError(f"{path} is empty; give it one JSON object a line.")
    _refuse_missing(path, list(known), names, "The keys of its objects are columns.")
    return Columns(path=path, cells=cells, places=places)


def _object(path: Path, place: int, line: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise ValueError(f'{path}: line {place} has the key "{twice[0]}" twice.')
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {place} is no JSON ({error.msg} at column {error.colno}): "
            f'{line[:60]!r}. Write one object a line: {{"file": "a.jpg", ...}}'
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: line {place} is no JSON object but {line[:60]!r}; write one "
            'object a line: {"file": "a.jpg", "label": "cat"}'
        )
    return found


def _parquet(path: Path, names: Sequence[str]) -> Columns:
    if importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            f"{path} is Parquet, which pyarrow reads, and that is not installed: pip "
            "install pyarrow, or write the table as CSV."
        )
    # By name: a type checker need not have it.
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            _refuse_missing(path, header, names, "")
            _check_unique(path, header, names)
            table = file.read(columns=list(names))
    except (OSError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is damaged or no Parquet file ({error}); write it again."
        ) from error
    cells = {name: table.column(name).to_pylist() for name in names}
    return Columns(path=path, cells=cells, places=range(1, table.num_rows + 1))


def _refuse_missing(
    path: Path, header: Sequence[str], names: Sequence[str], hint: str
) -> None:
    missing = [name for name in names if name not in header]
    if missing:
        known = [name for name in header if name]
        raise ValueError(
            f"{path} has no column {some(f'{n!r}' for n in missing)}; its columns: "
            f"{some(known, 20)}.{did_you_mean(missing[0], known)} {hint}".rstrip()
        )


def _check_unique(path: Path, header: Sequence[str], names: Sequence[str]) -> None:
    twice = [name for name in names if header.count(name) > 1]
    if twice:
        raise ValueError(
            f"{path} has {header.count(twice[0])} columns of the name {twice[0]!r}; "
            "give each its own name, so that one can be meant."
        )
