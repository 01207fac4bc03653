"""tools/prepare_dataset.py glyphs: a set of letters from whatever fonts there are."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import labels_of
from tiny_fonts import polygons, write_font

from big_vision_lite.data.ops.decode import decode
from big_vision_lite.data.sources import Tfds

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """The modules, found as when the tool runs as a script: in its own folder."""
    monkeypatch.syspath_prepend(TOOLS)
    found = [importlib.import_module(n) for n in ("glyph_fonts", "prepare_dataset")]
    yield found
    for module in found:
        sys.modules.pop(module.__name__)


def families(glyph_fonts, per_split):
    """Names families that fall to each split, `per_split` each."""
    chosen = {"train": [], "validation": [], "test": []}
    for number in range(300):
        names = chosen[glyph_fonts.split_of(f"Family{number}")]
        if len(names) < per_split:
            names.append(f"Family{number}")
    assert all(len(names) == per_split for names in chosen.values())
    return chosen


def prepare(prepare_dataset, capsys, fonts, out):
    code = prepare_dataset.main(["glyphs", "--fonts", str(fonts), "--out", str(out)])
    streams = capsys.readouterr()
    return code, streams.out + streams.err


def test_fonts_become_a_set_that_training_reads(tools, tmp_path, capsys):
    glyph_fonts, prepare_dataset = tools
    chosen, seed = families(glyph_fonts, 2), 0
    for names in chosen.values():
        for name in names:
            for style in ("Serif", "Sans"):
                seed += 1
                path = tmp_path / "fonts" / name / f"{style}.{'tT'[seed % 2]}tf"
                shapes = polygons(glyph_fonts.ALPHABET, seed)
                write_font(path, f"{name} {style}", shapes)
    code, text = prepare(prepare_dataset, capsys, tmp_path / "fonts", tmp_path / "sets")
    assert code == 0, text
    assert "12 fonts, 12 used, of 6 families; left out: none" in text
    for split, names in chosen.items():
        source = Tfds(
            dataset="glyphs32_latin", split=split, data_dir=str(tmp_path / "sets")
        )
        assert "".join(source.class_names) == glyph_fonts.ALPHABET
        assert len(source) == 4 * 62
        assert np.bincount(labels_of(source)).tolist() == [4] * 62
        # Every image is the glyph of its label, in one of the fonts of the split.
        drawn = set()
        for name in names:
            for path in (tmp_path / "fonts" / name).iterdir():
                _, glyphs = glyph_fonts.render(path)
                drawn |= {(g.tobytes(), label) for label, g in enumerate(glyphs)}
        for index in range(len(source)):
            example = source[index]
            image = decode(example["image"], 1)
            assert image.shape == (32, 32, 1)
            assert (image.tobytes(), example["label"]) in drawn
    # Light on dark: the ink is the smaller part, and bright.
    assert image.max() > 200 and np.median(image) == 0


def test_what_is_no_alphabet_or_no_new_one_is_left_out(tools, tmp_path, capsys):
    glyph_fonts, prepare_dataset = tools
    fonts = tmp_path / "fonts"
    for seed, names in enumerate(families(glyph_fonts, 1).values()):
        write_font(
            fonts / f"{seed}.ttf", names[0], polygons(glyph_fonts.ALPHABET, seed)
        )
    write_font(fonts / "copy.otf", "Other", polygons(glyph_fonts.ALPHABET, 0))
    lacking = polygons(glyph_fonts.ALPHABET.replace("q", ""), 7)
    write_font(fonts / "no_q.ttf", "Other", lacking)
    blank = polygons(glyph_fonts.ALPHABET, 8) | {"x": [(0, 0)] * 3}
    write_font(fonts / "blank_x.ttf", "Other", blank)
    (fonts / "broken.ttf").write_bytes(b"no font")
    code, text = prepare(prepare_dataset, capsys, fonts, tmp_path / "sets")
    assert code == 0, text
    assert (
        "7 fonts, 3 used, of 3 families; left out: 1 duplicates, 1 unreadable, 2 "
        "without all 62 characters" in text
    )


def test_a_drawing_with_two_labels_keeps_the_first(tools, tmp_path):
    glyph_fonts, _ = tools
    shapes = polygons(glyph_fonts.ALPHABET, 0)
    shapes |= {"c": shapes["C"], "l": shapes["I"]}
    write_font(tmp_path / "unicase.ttf", "Unicase", shapes)
    _, glyphs = glyph_fonts.render(tmp_path / "unicase.ttf")
    distinct = glyph_fonts._distinct(glyphs)
    missing = [glyph_fonts.ALPHABET[i] for i in np.flatnonzero(~distinct)]
    assert missing == ["c", "l"]


def test_capitals_are_larger_than_what_is_drawn_smaller(tools, tmp_path):
    """One scale for all letters of a face: size tells c from C."""
    glyph_fonts, _ = tools
    shapes = polygons(glyph_fonts.ALPHABET, 0)
    shapes["c"] = [(x // 2, y // 2) for x, y in shapes["C"]]
    write_font(tmp_path / "font.ttf", "Font", shapes)
    _, glyphs = glyph_fonts.render(tmp_path / "font.ttf")
    ink = glyphs.astype(float).sum((1, 2))
    large, small = (ink[glyph_fonts.ALPHABET.index(c)] for c in "Cc")
    assert small / large == pytest.approx(0.25, rel=0.1)


def test_a_family_is_in_one_split_and_most_are_for_training(tools):
    glyph_fonts, _ = tools
    for number in range(50):
        name = f"Maker{number}"
        assert glyph_fonts.split_of(f"{name} Sans") == glyph_fonts.split_of(
            f"{name.upper()} Serif Condensed"
        )
    splits = [glyph_fonts.split_of(f"Maker{n}") for n in range(3000)]
    shares = [splits.count(s) / 3000 for s in ("train", "validation", "test")]
    # Three standard deviations of 3,000 draws are 0.016 at 0.1.
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.022)


def test_mistakes_are_one_message(tools, tmp_path, capsys):
    glyph_fonts, prepare_dataset = tools
    code, text = prepare(prepare_dataset, capsys, tmp_path, tmp_path / "sets")
    assert code == 1 and "there is no font (.ttf, .otf) in" in text
    write_font(tmp_path / "a.ttf", "One", polygons(glyph_fonts.ALPHABET, 0))
    code, text = prepare(prepare_dataset, capsys, tmp_path, tmp_path / "sets")
    assert code == 1 and "the 1 families of fonts" in text and "add fonts" in text


def test_a_glyph_set_that_is_missing_is_told_how_it_is_made(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        len(Tfds(dataset="glyphs32_latin", data_dir=str(tmp_path)))
    command = f"prepare_dataset.py glyphs --fonts FOLDER --out {tmp_path} --name glyphs"
    assert command in str(caught.value)
