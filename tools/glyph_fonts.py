"""Renders the letters and digits of fonts: what `prepare_dataset.py glyphs` packs.

Every face is drawn at one scale and on one baseline, so that c and C differ by their
size, and each glyph is centred sideways.
"""

import collections
import dataclasses
import hashlib
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from big_vision_lite.data.sources.arrays import content_hash

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
SUFFIXES = (".ttf", ".otf")
SIDE_PX = 32
# What the tallest and widest letters take of it.
INK_PX = 27
# A face is measured at this size first.
MEASURED_PX = 100
# Two faces are one design, and two glyphs one drawing, when the squared difference of
# their pixels is at most this share of their mean square.
SAME_DESIGN = 0.015
# Percent of the font families that validation and test get, each.
HELD_OUT_PERCENT = 10


@dataclasses.dataclass(kw_only=True)
class Face:
    """One font file: `glyphs` [62, 32, 32] uint8, ink 255 on 0; `family` its name."""

    path: str
    family: str
    glyphs: np.ndarray
    # Which glyphs have one label only: unicase fonts draw c and C alike.
    distinct: np.ndarray


@dataclasses.dataclass(kw_only=True)
class Glyphs:
    """The glyphs of one split as a source of PNG files with labels."""

    faces: Sequence[Face]
    rows: list[tuple[int, int]] = dataclasses.field(init=False)

    def __post_init__(self):
        self.rows = [
            (number, int(label))
            for number, face in enumerate(self.faces)
            for label in np.flatnonzero(face.distinct)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number, label = self.rows[row]
        written, data = cv2.imencode(".png", self.faces[number].glyphs[label])
        assert written, "a small gray image"
        return {"image": data.tobytes(), "label": label}

    def relative_path(self, row: int) -> str:
        """Names the font file and the character."""
        number, label = self.rows[row]
        return f"{self.faces[number].path}#{ALPHABET[label]}"

    @property
    def fingerprint(self) -> str:
        return content_hash(
            f"{face.path} {hashlib.sha256(face.glyphs).hexdigest()}"
            for face in self.faces
        )


def open_splits(folder: str) -> dict[str, Glyphs]:
    """Renders every font below `folder`; a family of fonts is in one split only.

    Left out, and counted on the screen: fonts that cannot be read, that lack one of the
    62 characters, and that draw what another one draws.

    Raises:
        FileNotFoundError: there are no fonts.
        ValueError: they have too few families for three splits.
    """
    root = Path(folder).expanduser()
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"there is no font ({', '.join(SUFFIXES)}) in {root} or below it. Debian "
            "and Ubuntu keep fonts in /usr/share/fonts, macOS in /Library/Fonts."
        )
    left_out: collections.Counter[str] = collections.Counter()
    kept = list(_distinct_faces(root, paths, left_out))
    splits: dict[str, list[Face]] = {"train": [], "validation": [], "test": []}
    for face in kept:
        splits[split_of(face.family)].append(face)
    families = len({family_key(face.family) for face in kept})
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(left_out.items()))
    print(
        f"{len(paths)} fonts, {len(kept)} used, of {families} families; left out: "
        f"{reasons or 'none'}"
    )
    empty = [name for name, faces in splits.items() if not faces]
    if empty:
        raise ValueError(
            f"the {families} families of fonts in {root} leave nothing for "
            f"{' and '.join(empty)}: a family goes to one split by a hash of its name, "
            f"{HELD_OUT_PERCENT} % of them to each of validation and test. Some 50 "
            "families are enough; add fonts."
        )
    return {name: Glyphs(faces=faces) for name, faces in splits.items()}


def family_key(family: str) -> str:
    """Returns the first word of the name: Sans and Serif of one maker stay together."""
    words = family.split()
    return words[0].lower() if words else ""


def split_of(family: str) -> str:
    """Returns "train", "validation" or "test", by a hash of the family's first word."""
    digest = hashlib.sha256(family_key(family).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent >= 2 * HELD_OUT_PERCENT:
        return "train"
    return "validation" if percent < HELD_OUT_PERCENT else "test"


def _distinct_faces(
    root: Path, paths: Sequence[Path], left_out: collections.Counter[str]
) -> Iterator[Face]:
    """Yields the faces that can be used, the first of those that look alike."""
    seen = np.zeros((len(paths), len(ALPHABET) * (SIDE_PX // 2) ** 2), np.float32)
    count = 0
    for path in paths:
        try:
            family, glyphs = render(path)
        except OSError:
            left_out["unreadable"] += 1
            continue
        except LookupError:
            left_out["without all 62 characters"] += 1
            continue
        seen[count] = _small(glyphs).ravel()
        if (_differences(seen[:count], seen[count]) <= SAME_DESIGN).any():
            left_out["duplicates"] += 1
            continue
        count += 1
        yield Face(
            path=str(path.relative_to(root)),
            family=family,
            glyphs=glyphs,
            distinct=_distinct(glyphs),
        )


def render(path: Path) -> tuple[str, np.ndarray]:
    """Returns the family of a font and its 62 glyphs [62, 32, 32], light on dark.

    Raises:
        OSError: FreeType cannot read the file.
        LookupError: it has no glyph, or a blank one, for one of the characters.
    """

    def face(size: float) -> Any:
        basic = ImageFont.Layout.BASIC
        return ImageFont.truetype(str(path), size, layout_engine=basic)

    measured = face(MEASURED_PX)
    # What a font draws for a character that it does not have; U+FFFF is none.
    absent = bytes(measured.getmask("\uffff"))
    for character in ALPHABET:
        drawn = bytes(measured.getmask(character))
        if not any(drawn) or drawn == absent:
            raise LookupError(character)
    boxes = np.asarray([measured.getbbox(c, anchor="ls") for c in ALPHABET], float)
    # Percentiles: one letter with a long tail must not shrink all others.
    top, bottom = np.percentile(boxes[:, 1], 5), np.percentile(boxes[:, 3], 95)
    width = np.percentile(boxes[:, 2] - boxes[:, 0], 95)
    scale = INK_PX / max(bottom - top, width)
    baseline = SIDE_PX / 2 - scale * (top + bottom) / 2
    drawn_face = face(MEASURED_PX * scale)
    glyphs = np.zeros((len(ALPHABET), SIDE_PX, SIDE_PX), np.uint8)
    for glyph, character in zip(glyphs, ALPHABET, strict=True):
        left, _, right, _ = drawn_face.getbbox(character, anchor="ls")
        image = Image.new("L", (SIDE_PX, SIDE_PX))
        start = (SIDE_PX - left - right) / 2
        ImageDraw.Draw(image).text(
            (start, baseline), character, fill=255, font=drawn_face, anchor="ls"
        )
        glyph[:] = np.asarray(image)
    return str(measured.getname()[0] or path.stem), glyphs


def _small(glyphs: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels: a hinted and an unhinted copy are one design."""
    half = SIDE_PX // 2
    blocks = glyphs.astype(np.float32).reshape(len(glyphs), half, 2, half, 2)
    return blocks.mean((2, 4))


def _differences(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Returns |a - b|^2 over the mean of |a|^2 and |b|^2, for each row a of `many`."""
    squares = np.einsum("nd,nd->n", many, many) + one @ one
    return (squares - 2 * (many @ one)) / np.maximum(squares / 2, 1)


def _distinct(glyphs: np.ndarray) -> np.ndarray:
    """Says of each glyph whether the font draws no earlier character just so."""
    small = _small(glyphs).reshape(len(glyphs), -1)
    return np.asarray(
        [
            bool((_differences(small[:index], small[index]) > SAME_DESIGN).all())
            for index in range(len(small))
        ]
    )
