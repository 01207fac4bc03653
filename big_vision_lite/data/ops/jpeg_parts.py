"""The parts of a JPEG's bytes, and whether its scans hold a code for every block."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

SOI, EOI, SOS, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xDD
# Frames by marker; of one pass over the blocks: Huffman's, and one of arithmetic codes.
FRAMES = (
    *range(0xC0, 0xC4),
    *range(0xC5, 0xC8),
    *range(0xC9, 0xCC),
    *range(0xCD, 0xD0),
)
SEQUENTIAL, HUFFMAN = (0xC0, 0xC1, 0xC9), (0xC0, 0xC1)
# Markers that no length follows.
BARE = (0x01, *range(0xD0, 0xDA))

START = re.compile(rb"\xff+[^\x00\xff]")
# Ends the bytes of a scan: no stuffed zero, no restart, no fill byte.
END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
RESTART = re.compile(rb"\xff+[\xd0-\xd7]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A marker with the bytes after its length, and for SOS those of the scan."""

    marker: int
    body: bytes = b""
    scan: bytes = b""

    def joined(self) -> bytes:
        """Returns the part as a file holds it."""
        start = bytes([0xFF, self.marker])
        if self.marker in BARE:
            return start
        return start + (len(self.body) + 2).to_bytes(2, "big") + self.body + self.scan


def parts(data: bytes) -> Iterator[Part]:
    """Yields the parts after the first marker up to the last, without bytes between.

    A part that is cut short keeps the bytes that are there.
    """
    place = 2
    while found := START.search(data, place):
        marker, place = data[found.end() - 1], found.end()
        if marker in BARE:
            yield Part(marker=marker)
            if marker == EOI:
                return
            continue
        length = max(2, int.from_bytes(data[place : place + 2], "big"))
        body, scan = data[place + 2 : place + length], b""
        place += length
        if marker == SOS:
            end = END.search(data, place)
            scan = data[place : end.start() if end else len(data)]
            place += len(scan)
        yield Part(marker=marker, body=body, scan=scan)


def what_is_missing(found: Sequence[Part]) -> str:
    """Returns what the scans of a sequential Huffman JPEG lack, "" if they are whole.

    Follows the codes without computing pixels, about a million a second; progressive
    and arithmetic scans are not looked at.
    """
    try:
        return _what_is_missing(found)
    except (IndexError, ValueError):
        return "a part of the header is cut short"


def _what_is_missing(found: Sequence[Part]) -> str:
    tables: dict[int, _Codes] = {}
    frame, every, seen = None, 0, set()
    for part in found:
        if part.marker in FRAMES:
            if part.marker not in HUFFMAN:
                return ""
            frame = _Frame(part.body)
        elif part.marker == DHT:
            tables |= _tables(part.body)
        elif part.marker == DRI:
            every = int.from_bytes(part.body[:2], "big")
        elif part.marker == SOS and frame is not None:
            count = part.body[0]
            ids, used = (
                part.body[1 : 1 + 2 * count : 2],
                part.body[2 : 2 + 2 * count : 2],
            )
            pairs = [(tables.get(u >> 4), tables.get(16 + (u & 15))) for u in used]
            if any(None in pair for pair in pairs) or set(ids) - frame.sampling.keys():
                return "a scan names a table or a component that is not there"
            blocks = [
                pair
                for name, pair in zip(ids, pairs, strict=True)
                for _ in range(frame.blocks(name) if count > 1 else 1)
            ]
            if reason := _follow(part.scan, blocks, frame.units(ids), every):
                return reason
            seen |= set(ids)
    if frame is None:
        return "the header holds no frame"
    if seen != frame.sampling.keys():
        return "a component has no scan"
    return ""


class _Frame:
    """Size and sampling factors of the picture."""

    def __init__(self, body: bytes):
        self.height, self.width = (
            int.from_bytes(body[n : n + 2], "big") for n in (1, 3)
        )
        rows = [body[6 + 3 * n : 9 + 3 * n] for n in range(body[5])]
        # (across, down) of each component.
        self.sampling = {row[0]: (row[1] >> 4, row[1] & 15) for row in rows}

    def blocks(self, name: int) -> int:
        """Returns the blocks of a component in a unit of several components."""
        across, down = self.sampling[name]
        return across * down

    def units(self, ids: bytes) -> int:
        """Returns the units of a scan: groups of blocks, or the blocks of one."""
        most = [
            max(1, *factors) for factors in zip(*self.sampling.values(), strict=True)
        ]
        mine = self.sampling[ids[0]] if len(ids) == 1 else (1, 1)
        sides = zip((self.width, self.height), most, mine, strict=True)
        across, down = (-(-side * part // (8 * top)) for side, top, part in sides)
        return across * down


# For every 16 bits the length of the code that they begin with (0: none), the symbol.
_Codes = list[tuple[int, int]]


def _tables(body: bytes) -> dict[int, _Codes]:
    """Returns the codes by class (16: AC) and number."""
    found, place = {}, 0
    while place + 17 <= len(body):
        number, counts = body[place], body[place + 1 : place + 17]
        symbols = iter(body[place + 17 : place + 17 + sum(counts)])
        codes: _Codes = []
        for length, count in enumerate(counts, 1):
            for _, symbol in zip(range(count), symbols, strict=False):
                codes += [(length, symbol)] * (1 << (16 - length))
        found[(number >> 4 << 4) + (number & 15)] = (codes + [(0, 0)] * 65536)[:65536]
        place += 17 + sum(counts)
    return found


def _follow(scan: bytes, blocks: list, units: int, every: int) -> str:
    """Returns why the scan does not hold `units` of `blocks`, each (DC, AC)."""
    segments = RESTART.split(scan)
    wanted = -(-units // every) if every else 1
    if len(segments) < wanted:
        return f"{len(segments)} of {wanted} segments"
    for number, segment in enumerate(segments[:wanted]):
        held = min(every, units - number * every) if every else units
        if reason := _follow_segment(segment.replace(b"\xff\0", b"\xff"), blocks, held):
            return reason
    return ""


def _follow_segment(segment: bytes, blocks: list, units: int) -> str:
    padded = np.frombuffer(segment + bytes(4), np.uint8).astype(np.int64)
    # The 24 bits from each byte on.
    window = ((padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]).tolist()
    place, end = 0, 8 * len(segment)
    for _ in range(units):
        for direct, alternating in blocks:
            coefficient, codes = 0, direct
            while coefficient < 64:
                if place >= end:
                    return "premature end of data segment"
                bits = window[place >> 3] >> (8 - (place & 7)) & 0xFFFF
                length, symbol = codes[bits]
                if not length:
                    return "bad Huffman code"
                place += length + (symbol if codes is direct else symbol & 15)
                if codes is not direct and not symbol & 15 and symbol >> 4 != 15:
                    break
                coefficient += 1 if codes is direct else (symbol >> 4) + 1
                codes = alternating
    return "" if place <= end else "premature end of data segment"
