"""Small tables of images with known labels, shared by the tests of what reads them."""

import pathlib

import cv2
import numpy as np

from big_vision_lite.data.sources import LabelKind, Table

SIDE = 8


def write_table(
    folder: pathlib.Path, count: int = 24, name: str = "labels.csv"
) -> pathlib.Path:
    """Writes gray images, bright at the top or at the left, and what they show.

    Columns: file, class (dark or light), tags (top|left), top and left (0 or 1), grey
    (0..255), tilt (-1..1) and part (train, val).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file,class,tags,top,left,grey,tilt,part"]
    rng = np.random.default_rng(0)
    for index in range(count):
        top, left, grey = index % 2, index // 2 % 2, 40 + 5 * index % 100
        pixels = np.full((SIDE, SIDE), grey, np.float64)
        pixels[: SIDE // 2] += 60 * top
        pixels[:, : SIDE // 2] += 60 * left
        pixels += rng.integers(0, 3, pixels.shape)
        file = f"{index:03d}.png"
        cv2.imwrite(str(folder / file), pixels.astype(np.uint8))
        tags = "|".join(n for n, on in (("top", top), ("left", left)) if on) or "|"
        kind = "light" if grey > 90 else "dark"
        part = "val" if index % 4 == 3 or index % 8 == 0 else "train"
        rows.append(
            f"{file},{kind},{tags},{top},{left},{grey},{grey / 70 - 1:.4f},{part}"
        )
    path = folder / name
    path.write_text("\n".join(rows) + "\n")
    return path


def table(path: pathlib.Path, *label: str, kind: str = "class", **fields) -> Table:
    return Table(
        path=str(path),
        image="file",
        label=label,
        kind=LabelKind(kind),
        **{"split": "all", **fields},
    )
