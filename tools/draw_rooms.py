"""Draws the rooms of the package as the README shows them: tools/rooms.svg.

  python tools/draw_rooms.py

What stands above what is read from big_vision_lite/README.md, what a room is for from
the first line of its docstring.
"""

import ast
import pathlib
import textwrap
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "big_vision_lite"
OUT = ROOT / "tools" / "rooms.svg"
WIDTH_PX, GAP_PX, LINE_PX = 960, 6, 13
STYLE = """
text { font-family: system-ui, sans-serif; fill: #1f2933 }
.name { font-size: 14px; font-weight: 600 }
.what { font-size: 10.5px; fill: #52606d }
.room { fill: #eef4fb; stroke: #9fb8d6 }
.file { fill: #fbf5e9; stroke: #d9c39a }
.note { font-size: 11px; fill: #7b8794 }
"""


def floors() -> list[list[str]]:
    """Returns the names of rooms and root files, what others stand on first."""
    text = (PACKAGE / "README.md").read_text()
    block = text.split("```arrows\n")[1].split("```")[0]
    return [line.split() for line in block.strip().splitlines()]


def purpose(name: str) -> str:
    """Returns the first line of the docstring of a room or root file."""
    folder = PACKAGE / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return docstring.splitlines()[0].partition(": `python")[0].rstrip(".")


def words(name: str, width: float) -> list[str]:
    """Returns what a room is for, in lines that fit into it."""
    return textwrap.wrap(purpose(name), max(16, int(width / 5.6)))


def box(name: str, x: float, y: float, width: float, height: int) -> str:
    """Returns one room or root file."""
    kind = "room" if (PACKAGE / name).is_dir() else "file"
    title = f"{name}/" if kind == "room" else f"{name}.py"
    what = "".join(
        f'<text class="what" x="{x + 8:.0f}" y="{y + 32 + LINE_PX * i:.0f}">'
        f"{escape(line)}</text>"
        for i, line in enumerate(words(name, width))
    )
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" '
        f'height="{height}" rx="5"/>'
        f'<text class="name" x="{x + 8:.0f}" y="{y + 18:.0f}">{title}</text>{what}'
    )


def draw() -> str:
    """Returns the picture as SVG."""
    boxes, y = [], 0
    for names in floors()[::-1]:
        width = (WIDTH_PX - GAP_PX * (len(names) - 1)) / len(names)
        lines = max(len(words(name, width)) for name in names)
        height = 27 + LINE_PX * lines
        for column, name in enumerate(names):
            boxes.append(box(name, column * (width + GAP_PX), y, width, height))
        y += height + GAP_PX
    note = "A room imports only what stands below it, and no neighbour of its floor."
    size = f'width="{WIDTH_PX + 8}" height="{y + 20}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {WIDTH_PX + 8} '
        f'{y + 20}" role="img"><title>The rooms of big_vision_lite</title>'
        f'<style>{STYLE}</style><rect x="-4" y="-4" {size} fill="white"/>\n'
        + "\n".join(boxes)
        + f'\n<text class="note" x="0" y="{y + 9}">{note}</text></svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(draw())
    print(f"wrote {OUT.relative_to(ROOT)}")
