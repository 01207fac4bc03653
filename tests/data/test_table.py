"""Tables of labels: every format gives the same examples, and mistakes are said."""

import json
import logging
import pickle

import numpy as np
import pytest

from big_vision_lite.data.sources import LabelKind, Table
from big_vision_lite.data.sources.table import describe, table_splits

FILES = [f"{index:02d}.png" for index in range(20)]


@pytest.fixture
def folder(tmp_path):
    for index, file in enumerate(FILES):
        (tmp_path / file).write_bytes(b"image %d" % index)
    return tmp_path


def write(folder, text, name="labels.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


def csv_of(column, cells, files=FILES):
    return f"file,{column}\n" + "".join(
        f"{file},{cell}\n" for file, cell in zip(files, cells, strict=False)
    )


def table(path, **fields):
    fields |= {"kind": LabelKind(fields.get("kind", "class"))}
    return Table(**{"path": path, "image": "file", "label": "class", **fields})


def examples(source):
    return [source[index] for index in range(len(source))]


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)


NAMES = ["red", "blue", "grün", "red, dark"] * 5
ROWS = list(zip(FILES, NAMES, strict=True))


def as_delimited(delimiter):
    return f"file{delimiter}class\n" + "".join(
        f'{file}{delimiter}"{name}"\n' for file, name in ROWS
    )


def as_json_lines():
    lines = [json.dumps({"file": f, "class": c}) for f, c in ROWS]
    return "\n".join(lines)


TEXTS = {
    "a.csv": as_delimited(","),
    "semicolons.csv": as_delimited(";"),
    "tabs.csv": as_delimited("\t"),
    "spaces.csv": as_delimited(", "),
    "dos.csv": as_delimited(",").replace("\n", "\r\n"),
    "with_bom.csv": "\ufeff" + as_delimited(","),
    "a.tsv": as_delimited("\t"),
    "a.jsonl": as_json_lines(),
    "a.ndjson": as_json_lines() + "\n\n",
}


@pytest.mark.parametrize("name", [*TEXTS, "a.parquet"])
def test_every_format_gives_the_same_examples(folder, name):
    if name in TEXTS:
        path = write(folder, TEXTS[name], name)
    else:
        path = str(folder / name)
        write_parquet(path, {"file": FILES, "class": NAMES})
    source = table(path, split="all")
    assert source.class_names == ("blue", "grün", "red", "red, dark")
    found = examples(source)
    assert [e["image"] for e in found] == [b"image %d" % i for i in range(20)]
    assert [source.class_names[e["label"]] for e in found] == NAMES
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert again.name(3) == str(folder / FILES[3])


def test_names_that_are_numbers_sort_as_numbers(folder):
    path = write(folder, csv_of("class", [0, 2, 10, 1] * 5))
    assert table(path).class_names == ("0", "1", "2", "10")
    path = write(folder, csv_of("class", ["10", "9", "a", "1"] * 5))
    assert table(path).class_names == ("1", "10", "9", "a")


def test_pinned_classes_give_the_order_and_refuse_others(folder):
    path = write(folder, csv_of("class", ["a", "b"] * 10))
    source = table(path, classes=("b", "c", "a"), split="all")
    assert [e["label"] for e in examples(source)] == [2, 0] * 10
    np.testing.assert_array_equal(source.class_counts(), [10, 0, 10])
    with pytest.raises(ValueError, match=r"1 classes unknown to training: b.*mean"):
        len(table(path, classes=("a", "bb")))


def test_several_classes_a_cell_and_a_column_each_give_the_same_labels(folder):
    cells = ["a|b", "b", "|", "a | c"] * 5
    found = table(
        write(folder, csv_of("class", cells)), kind=LabelKind.CLASSES, split="all"
    )
    assert found.class_names == ("a", "b", "c")
    rows = [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]] * 5
    labels = [example["label"] for example in examples(found)]
    np.testing.assert_array_equal(labels, rows)
    assert labels[0].dtype == np.float32
    words = ["no,0,false", "yes,1,True"]
    text = "file,a,b,c\n" + "".join(
        f"{file},"
        + ",".join(words[int(on)].split(",")[k] for k, on in enumerate(row))
        + "\n"
        for file, row in zip(FILES, rows, strict=True)
    )
    other = table(
        write(folder, text), label=("a", "b", "c"), kind=LabelKind.FLAGS, split="all"
    )
    np.testing.assert_array_equal([e["label"] for e in examples(other)], rows)
    assert other.class_names == found.class_names
    np.testing.assert_array_equal(other.class_counts(), found.class_counts())
    lists = "\n".join(
        json.dumps({"file": f, "class": [c for c in cell.split("|") if c.strip()]})
        for f, cell in zip(FILES, cells, strict=True)
    )
    third = table(write(folder, lists, "a.jsonl"), kind=LabelKind.CLASSES, split="all")
    np.testing.assert_array_equal([e["label"] for e in examples(third)], rows)


def test_numbers_are_targets_with_the_names_of_their_columns(folder):
    text = "file,height (cm),n\n" + "".join(
        f"{f},{i / 3},{i}e-3\n" for i, f in enumerate(FILES)
    )
    source = table(
        write(folder, text), label=("n", "height (cm)"), kind="numbers", split="all"
    )
    assert source.class_names == ("n", "height (cm)")
    expected = np.float32([[i * 1e-3, i / 3] for i in range(20)])
    np.testing.assert_array_equal(source.targets, expected)
    np.testing.assert_array_equal(source[7]["target"], expected[7])
    assert "label" not in source[7]


def test_a_seeded_share_of_each_class_is_held_out(folder):
    path = write(folder, csv_of("class", ["a"] * 15 + ["b"] * 4 + ["c"]))
    train, val = table(path, held_out=0.2), table(path, held_out=0.2, split="val")
    names = [{s.name(i) for i in range(len(s))} for s in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20
    np.testing.assert_array_equal(val.class_counts(), [3, 1, 0])
    np.testing.assert_array_equal(train.class_counts(), [12, 3, 1])
    # The order of the rows does not matter, another seed does.
    lines = (folder / "labels.csv").read_text().splitlines()
    backwards = write(folder, "\n".join([lines[0], *lines[:0:-1]]), "back.csv")
    again = table(backwards, held_out=0.2, split="val")
    assert {again.name(i) for i in range(len(again))} == names[1]
    other = table(path, held_out=0.2, split="val", split_seed=1)
    assert {other.name(i) for i in range(len(other))} != names[1]


def test_a_column_names_the_splits(folder):
    words = ["Training", "train", "valid", "TEST"] * 5
    text = "file,class,part\n" + "".join(
        f"{f},{c},{w}\n" for f, c, w in zip(FILES, "abab" * 5, words, strict=True)
    )
    splits = table_splits(table(write(folder, text), split_column="part"))
    assert {name: len(s) for name, s in splits.items()} == {
        "train": 10,
        "val": 5,
        "test": 5,
    }
    assert {s.classes for s in splits.values()} == {("a", "b")}
    folds = table(write(folder, text), split_column="part", split="fold3")
    with pytest.raises(
        ValueError, match=r"no rows of split 'fold3'; it has train \(10"
    ):
        len(folds)


def test_the_paragraph_says_splits_counts_and_ranges(folder):
    path = write(
        folder,
        "file,class,n\n"
        + "".join(f"{f},{'abb'[i % 3]},{i / 2}\n" for i, f in enumerate(FILES)),
    )
    lines = describe([*table_splits(table(path)).values(), table(path)])
    assert lines == [
        f"table        {path}",
        "  train      18 images of 2 classes: smallest a (6), largest b (12)"
        " (by a hash, split_seed=0)",
        "  val        2 images of 2 classes: smallest a (1), largest a (1)"
        " (by a hash, split_seed=0)",
    ]
    numbers = table(path, label="n", kind="numbers", split="all")
    assert describe([numbers])[1] == "  all        20 images: n 0 to 9.5"


def test_the_same_row_twice_stays_in_one_split(folder):
    files = [*FILES, *(f"./{file}" for file in FILES)]
    path = write(folder, csv_of("class", ["a", "b"] * 20, files))
    train, val = table(path), table(path, split="val")
    assert len(train) + len(val) == 40 and len(val) == 4
    plain = [{s.name(i).replace("./", "") for i in range(len(s))} for s in (train, val)]
    assert not plain[0] & plain[1]


def test_spellings_of_one_class_are_said(folder, caplog):
    path = write(folder, csv_of("class", ["cat", "Cat", "dog", "1", "01"] * 4))
    with caplog.at_level(logging.WARNING):
        len(table(path))
    assert "'Cat', 'cat'; if they are one class" in caplog.text
    assert "'01', '1'; if they are" in caplog.text


ab = ["a", "b"] * 10
# What is written, what is asked, and what is said.
REFUSED = {
    "no column": (csv_of("clas", ab), {}, "no column 'class'.*Did you mean \"clas\""),
    "two missing": ("x,y\n1,2\n", {}, "no column 'file', 'class'; its columns: x, y"),
    "no header": (csv_of("class", ab)[11:], {}, "The first line names the columns"),
    "twice": ("file,class,class\n00.png,a,b\n", {}, "2 columns of the name 'class'"),
    "header alone": ("file,class\n", {}, "column names and no rows"),
    "empty": ("", {}, "is empty: 0 bytes"),
    "blank": ("\n\n", {}, "is empty"),
    "empty cells": (
        csv_of("class", ["a", "", "b", " "] * 5),
        {},
        r'10 of 20 cells of column "class" are empty, lines 3, 5, 7, 9, 11 and 5 more',
    ),
    "empty path": ("file,class\n,a\n00.png,b\n", {}, '"file" are empty, line 2'),
    "ragged": (
        "file,class\n00.png,a\n01.png,b,c\n02.png\n",
        {},
        "2 rows have another number of cells than the 2 columns: line 3 has 3, line 4",
    ),
    "open quote": ('file,class\n00.png,"a\n01.png,b\n', {}, "begins on line 2.*quote"),
    "line after a cell of two": (
        'file,class,note\n00.png,a,"x\ny"\n01.png,,z\n',
        {},
        "are empty, line 4",
    ),
    "one class": (csv_of("class", ["a"] * 20), {}, "one class .a. in training"),
    "numbers as classes": (
        csv_of("class", [0.5, 1, 2.5, 4] * 5),
        {},
        'kind="numbers" trains a regression',
    ),
    "no number": (
        csv_of("class", ["1", "n/a", "3,5", "4"] * 5).replace("3,5", '"3,5"'),
        {"kind": "numbers"},
        r"10 of 20 .*are no finite number.*'n/a', '3,5'.*lines 3, 4",
    ),
    "not finite": (
        csv_of("class", ["1", "inf", "nan", "1e39", "1_0"] * 4),
        {"kind": "numbers"},
        "16 of 20",
    ),
    "no flag": (
        csv_of("class", ["1", "0", "2", "maybe"] * 5),
        {"kind": "flags"},
        "10 of 20 .*are no flag .'2', 'maybe'.*write 1, true, yes, 0",
    ),
    "no separator": (
        csv_of("class", ["a;b", "b"] * 10),
        {"kind": "classes"},
        "holds the separator '|'; 10 hold ';': separator=';'",
    ),
    "empty classes": (
        csv_of("class", ["a|b", ""] * 10),
        {"kind": "classes"},
        "an image of no class has a lone '|'",
    ),
    "two labels": (
        csv_of("class", ["a", "b", "a"], ["00.png", "01.png", "./01.png"]),
        {},
        '01.png has two labels, lines 3, 4; .*kind="classes"',
    ),
    "two splits": (
        "file,class,part\n00.png,a,train\n00.png,a,test\n",
        {"split_column": "part"},
        "in two splits, train and test, lines 2, 3",
    ),
    "empty split": (
        "file,class,part\n00.png,a,train\n01.png,b,\n",
        {"split_column": "part"},
        '"part" are empty, line 3',
    ),
    "no training split": (
        "file,class,part\n00.png,a,fold0\n01.png,b,fold1\n",
        {"split_column": "part", "split": "fold0"},
        "no rows of split 'train' to take the classes from, only fold0, fold1; pin",
    ),
    "unknown to training": (
        "file,class,part\n00.png,a,train\n01.png,b,train\n02.png,c,val\n",
        {"split_column": "part", "split": "val"},
        "val of .*has 1 classes unknown to training: c",
    ),
    "no image": (
        csv_of("class", ab, [f"images/{file}" for file in FILES]),
        {},
        "has 'images/.*looked for in .*root=None.*there is no image.*root=FOLDER",
    ),
    "no suffix": (
        csv_of("class", ab, [f[:2] for f in FILES]),
        {},
        "there is 00.png: w",
    ),
    "backslash": (csv_of("class", ab, [f".\\{f}" for f in FILES]), {}, 'write "/"'),
    "address": (
        csv_of("class", ab, [f"http://x/{f}" for f in FILES]),
        {},
        "fetch the images",
    ),
    "a folder": (csv_of("class", ["a", "b"], [".", ".."]), {}, "is a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_table_must_not_hold_is_said(folder, case):
    text, fields, message = REFUSED[case]
    source = table(write(folder, text), **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        len(source)
    assert str(folder) in str(caught.value)


REFUSED_LINES = {
    "no object": ('["00.png", "a"]', "line 1 is no JSON object but"),
    "no JSON": ('{"file": "00.png", "class": "a"}\n{"file":', "line 2 is no JSON"),
    "missing in all": ('{"file": "00.png", "label": "a"}', "no column 'class'"),
    "missing in one": (
        '{"file": "00.png", "class": "a"}\n\n{"file": "01.png"}',
        "are empty, line 3",
    ),
    "key twice": ('{"file": "0", "class": "a", "class": "b"}', 'the key "class" twice'),
    "object": ('{"file": "00.png", "class": {"a": 1}}', "are no name of a class"),
    "zero byte": ('{"file": "0\\u0000.png", "class": "a"}', "are no path of a file"),
    "half a character": ('{"file": "\\ud800.png", "class": "a"}', "are no path"),
    "path of a number": ('{"file": 0.5, "class": "a"}', "are no path of a file"),
}


@pytest.mark.parametrize("case", REFUSED_LINES)
def test_what_json_lines_must_not_hold_is_said(folder, case):
    text, message = REFUSED_LINES[case]
    with pytest.raises(ValueError, match=message):
        len(table(write(folder, text, "a.jsonl")))


def test_a_damaged_parquet_file_and_its_empty_cells_are_said(folder):
    path = str(folder / "a.parquet")
    write_parquet(path, {"file": FILES, "class": [None, *NAMES[1:]]})
    with pytest.raises(ValueError, match='1 of 20 cells of column "class".*row 1;'):
        len(table(path))
    with pytest.raises(ValueError, match="no column 'clas'.*Did you mean \"class\""):
        len(table(path, label="clas"))
    (folder / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ValueError, match="is damaged or no Parquet file"):
        len(table(path))


def test_parquet_without_pyarrow_is_refused_in_words(folder, monkeypatch):
    path = write(folder, "x", "a.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        len(table(path))


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("latin-1", r"not UTF-8 \(byte 0xfc on line 4\).*iconv -f WINDOWS-1252"),
        ("utf-16", "not UTF-8.*iconv -f UTF-16 "),
        ("utf-16-le", "zero bytes, first on line 1.*iconv -f UTF-16LE"),
        ("utf-16-be", "not UTF-8.*iconv -f UTF-16 "),
    ],
)
def test_other_encodings_are_refused_with_how_to_convert(folder, encoding, message):
    text = csv_of("class", NAMES).replace("red, dark", "dark")
    if encoding == "utf-16-le":
        text = text.replace("ü", "u")
    with pytest.raises(ValueError, match=message):
        len(table(write(folder, text, encoding=encoding)))


def test_what_is_no_table_is_said(folder):
    write(folder, "x", "labels.csv")
    cases = {
        "label.csv": (FileNotFoundError, 'no table .*label.csv; .*mean "labels.csv"'),
        "": (ValueError, "is a folder, not a table"),
    }
    for name in ("a.json", "a.xlsx", "a.csv.gz", "a"):
        write(folder, "x", name)
        cases[name] = ValueError, "tables are read by suffix: .csv, .tsv"
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            len(table(str(folder / name)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label": ()}, "name the columns"),
        ({"label": "file"}, "column 'file' is named twice"),
        ({"label": ("a", "b")}, "label names 2 columns .*kind=flags"),
        ({"kind": "numbers", "classes": ("a",)}, "classes=a mean nothing"),
        ({"classes": ("a", "a")}, "names 'a' twice"),
        ({"separator": ";"}, 'for kind="classes" alone'),
        ({"separator": "", "kind": "classes"}, "text between several classes"),
        ({"split": "test"}, "none of train, val, all; name the column"),
        ({"held_out": 1.0}, "not a share between 0 and 1"),
        ({"split_column": "part", "held_out": 0.2}, "choose nothing"),
        ({"split_seed": -1}, "outside 0 to"),
    ],
)
def test_fields_that_mean_nothing_are_refused_before_anything_is_read(fields, message):
    with pytest.raises(ValueError, match=message):
        table("nowhere.csv", **fields)
