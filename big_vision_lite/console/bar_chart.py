"""Draws stacked bar charts as a PNG, using OpenCV only."""

import dataclasses
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

WIDTH, LEFT, ROW, MARGIN = 1100, 150, 34, 16
FONT, SIZE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
# (blue, green, red) of the Okabe-Ito palette, which colour-blind people can tell apart.
COLOURS = (
    *((178, 114, 0), (0, 159, 230), (115, 158, 0), (167, 121, 204), (0, 94, 213)),
    *((233, 180, 86), (66, 228, 240), (120, 120, 120), (180, 180, 180)),
)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of stacked bars by name, each {kind: length}, on one scale."""

    title: str
    bars: Mapping[str, Mapping[str, float]]


def draw(charts: Sequence[Chart]) -> bytes:
    """Returns a PNG, as bytes, of all charts one below the other."""
    sheet = np.concatenate([_chart(chart) for chart in charts])
    encoded, data = cv2.imencode(".png", sheet)
    assert encoded, f"PNG of {sheet.shape}"
    return data.tobytes()


def _chart(chart: Chart) -> np.ndarray:
    kinds = list(dict.fromkeys(kind for bar in chart.bars.values() for kind in bar))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    height = 2 * MARGIN + ROW * (1 + len(chart.bars)) + 20 * len(kinds)
    sheet = np.full((height, WIDTH, 3), 255, np.uint8)
    _write(sheet, chart.title, MARGIN, MARGIN + 12)
    longest = max((sum(bar.values()) for bar in chart.bars.values()), default=0) or 1
    scale = (WIDTH - LEFT - 100) / longest
    top = MARGIN + ROW
    for name, bar in chart.bars.items():
        _write(sheet, name, MARGIN, top + 18)
        left = float(LEFT)
        for kind, length in bar.items():
            right = left + length * scale
            corners = (round(left), top), (round(right), top + ROW - 10)
            cv2.rectangle(sheet, *corners, colours[kind], cv2.FILLED)
            left = right
        _write(sheet, f"{sum(bar.values()):.2f}", round(left) + 6, top + 18)
        top += ROW
    for kind in kinds:
        cv2.rectangle(sheet, (LEFT, top), (LEFT + 14, top + 12), colours[kind], -1)
        _write(sheet, kind, LEFT + 22, top + 11)
        top += 20
    return sheet


def _write(sheet: np.ndarray, text: str, left: int, base: int) -> None:
    cv2.putText(sheet, text, (left, base), FONT, SIZE, BLACK, 1, cv2.LINE_AA)
