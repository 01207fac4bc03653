"""Decodes damaged image files in a process of its own and reports what came of it.

  python tests/mutated_images.py FIRST LAST

Prints one line a file that decodes though libjpeg says that data is missing, and at the
end counts, the slowest file and the peak of memory, as JSON.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import time

import cv2
import image_kinds
import numpy as np

from big_vision_lite.data.ops import jpeg_parts
from big_vision_lite.data.ops.decode import UndecodableImage, decode

NAMES = list(image_kinds.KINDS)
# What libjpeg warns of when a picture lacks data. Other warnings are about headers,
# versions and bytes that nobody needs.
MISSING = (
    *("premature end", "Premature end", "bad Huffman code", "bad arithmetic code"),
    *("instead of RST", "Inconsistent progression"),
)


def peak_gib() -> float:
    """Returns this process's peak; ru_maxrss is also that of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20


def mutated(number: int) -> tuple[str, bytes]:
    """Returns the kind and the bytes of a file with flips, a cut and a repeat in it."""
    rng = np.random.default_rng([7, number])
    name = NAMES[number % len(NAMES)]
    data = bytearray(image_kinds.KINDS[name](rng))
    # Headers are a small part of a file and the most fragile one.
    end = len(data) if rng.random() < 0.6 else min(len(data), 200)
    for kind in rng.choice(["flip", "cut", "repeat"], rng.integers(1, 3)):
        place, length = int(rng.integers(0, end)), int(rng.integers(1, 40))
        if kind == "flip":
            for at in rng.integers(0, end, rng.integers(1, 8)):
                data[at % len(data)] ^= int(rng.integers(1, 256))
        elif kind == "cut" and rng.random() < 0.5:
            del data[place : place + length]
        elif kind == "cut":
            del data[place:]
        else:
            data[place:place] = data[place : place + length] * int(rng.integers(1, 9))
        data = data or bytearray(b"\0")
    return name, bytes(data)


class Libjpeg:
    """What OpenCV's libjpeg prints about a JPEG that it decodes."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()
        self._shown = os.dup(2)

    def warning(self, data: bytes) -> str:
        """Returns the first warning, "" if there is none."""
        self._file.seek(0)
        self._file.truncate()
        os.dup2(self._file.fileno(), 2)
        try:
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            pass  # too large
        finally:
            os.dup2(self._shown, 2)
        self._file.seek(0)
        return self._file.read().decode(errors="replace").strip()


def main(first: int, last: int) -> None:
    counts = {"decoded": 0, "refused": 0, "libjpeg misses data": 0}
    slowest, decoded = (0.0, ""), set()
    for number in range(first, last):
        name, data = mutated(number)
        # Read by who looks for the file that ended the process.
        print(number, name, end="\r", file=sys.stderr, flush=True)
        started = time.process_time()
        try:
            image = decode(data)
            assert image.dtype == np.uint8 and image.shape[2:] == (3,)
            decoded.add(number)
        except UndecodableImage as error:
            assert error.reason
        slowest = max(slowest, (time.process_time() - started, f"{number} {name}"))
    counts |= {"decoded": len(decoded), "refused": last - first - len(decoded)}
    # Before the judge, which fills gigabytes for a header that names a large picture.
    peak = peak_gib()
    libjpeg, silent = Libjpeg(), []
    for number in range(first, last):
        name, data = mutated(number)
        if not data.startswith(b"\xff\xd8\xff") or size(data) > 1_000_000:
            continue
        warning = libjpeg.warning(data)
        if any(words in warning for words in MISSING):
            counts["libjpeg misses data"] += 1
            if number in decoded:
                silent.append(f"{number} {name}: {warning}")
    found = {"counts": counts, "silent": silent, "slowest": slowest, "peak_gib": peak}
    print(json.dumps(found))


def size(data: bytes) -> int:
    """Returns the pixels that the first frame of a JPEG names, 0 without one."""
    for part in jpeg_parts.parts(data):
        if part.marker in jpeg_parts.FRAMES:
            sides = part.body[1:3], part.body[3:5]
            return int.from_bytes(sides[0], "big") * int.from_bytes(sides[1], "big")
    return 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
