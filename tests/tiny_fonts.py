"""The smallest TrueType fonts: one polygon a character, another one in every font."""

import pathlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np

UNITS = 1000
FIRST, LAST = ord("0"), ord("z")
Polygon = Sequence[tuple[int, int]]


def polygons(characters: str, seed: int) -> dict[str, Polygon]:
    """Draws a random polygon a character, and other ones with another seed."""
    rng = np.random.default_rng(seed)
    return {
        character: [(int(x), int(y)) for x, y in rng.integers(0, UNITS, (6, 2))]
        for character in characters
    }


def write_font(path: pathlib.Path, family: str, shapes: Mapping[str, Polygon]) -> None:
    """Writes a font that has the characters of `shapes` and no others."""
    square = [(100, 100), (100, 700), (700, 700), (700, 100)]
    drawn = [square, *shapes.values()]  # the first is drawn for what is not there
    glyphs = [_glyph(polygon) for polygon in drawn]
    offsets = np.cumsum([0, *map(len, glyphs)])
    number = {ord(character): i + 1 for i, character in enumerate(shapes)}
    codes = [number.get(code, 0) for code in range(FIRST, LAST + 1)]
    mapping = struct.pack(">5H", 6, 10 + 2 * len(codes), 0, FIRST, len(codes))
    mapping += struct.pack(f">{len(codes)}H", *codes)
    tables = {
        "cmap": struct.pack(">HHHHL", 0, 1, 3, 1, 12) + mapping,
        "glyf": b"".join(glyphs),
        "head": struct.pack(
            ">LLLLHHQQ4hHHhhh",
            *(0x10000, 0x10000, 0, 0x5F0F3CF5, 0, UNITS, 0, 0),
            *(0, 0, UNITS, UNITS, 0, 8, 2, 1, 0),
        ),
        "hhea": struct.pack(
            ">LhhhH11hH", 0x10000, UNITS, 0, 0, UNITS, *[0] * 11, len(drawn)
        ),
        "hmtx": struct.pack(">Hh", UNITS, 0) * len(drawn),
        "loca": struct.pack(f">{len(offsets)}L", *map(int, offsets)),
        "maxp": struct.pack(">LH13H", 0x10000, len(drawn), 6, 1, *[0] * 11),
        "name": _names({1: family, 2: "Regular"}),
    }
    start = 12 + 16 * len(tables)
    directory, body = struct.pack(">LHHHH", 0x10000, len(tables), 128, 3, 0), b""
    for tag, content in sorted(tables.items()):
        place = start + len(body)
        directory += struct.pack(">4sLLL", tag.encode(), 0, place, len(content))
        body += content + b"\0" * (-len(content) % 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(directory + body)


def _glyph(polygon: Polygon) -> bytes:
    points = np.asarray(polygon)
    steps = np.diff(points, axis=0, prepend=0)
    count = len(points)
    head = struct.pack(">h4h", 1, *points.min(0).tolist(), *points.max(0).tolist())
    head += struct.pack(">HH", count - 1, 0) + b"\1" * count
    columns = [struct.pack(f">{count}h", *steps[:, axis].tolist()) for axis in (0, 1)]
    whole = head + b"".join(columns)
    return whole + b"\0" * (-len(whole) % 4)


def _names(names: Mapping[int, str]) -> bytes:
    records, texts = b"", b""
    for number, text in names.items():
        encoded = text.encode("utf-16-be")
        place = 3, 1, 0x409, number, len(encoded), len(texts)
        records += struct.pack(">6H", *place)
        texts += encoded
    return struct.pack(">3H", 0, len(names), 6 + len(records)) + records + texts
