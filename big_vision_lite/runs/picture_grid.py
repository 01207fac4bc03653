"""Writes images in rows and columns as one PNG."""

from typing import Any

import cv2
import numpy as np
from etils import epath

from big_vision_lite.runtime import files

GAP_PX = 2


def write_grid(images: Any, path: epath.Path, *, columns: int) -> None:
    """Writes images [B, H, W, C] of 0..255, C 1 or 3, row by row as one PNG."""
    shown = np.clip(np.round(np.asarray(images)), 0, 255).astype(np.uint8)
    count, height, width, channels = shown.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (rows * (height + GAP_PX), columns * (width + GAP_PX), channels)
    sheet = np.zeros(size, np.uint8)
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        top, left = row * (height + GAP_PX), column * (width + GAP_PX)
        sheet[top : top + height, left : left + width] = image
    if channels == 3:
        sheet = sheet[..., ::-1]
    encoded, data = cv2.imencode(".png", sheet)
    assert encoded, f"PNG of {sheet.shape}"
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, data.tobytes())
