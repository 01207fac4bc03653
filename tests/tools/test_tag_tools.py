"""Tags counted, made up and looked up; duplicates of evaluation images found."""

import csv
import importlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from prepared import prepare
from tables import write_table

from big_vision_lite.data.sources import Tags, Tfds, vocabulary
from big_vision_lite.evaluators.duplicates import read_names

TOOLS = Path(__file__).parents[2] / "tools"
CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = tuple("class 0,class 1,class 2,class 3".split(","))


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(TOOLS))
    names = ("prepare_dataset", "noisy_tags", "find_duplicates", "tag_vocabulary")
    found = {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(TOOLS))
    return found


def run(tool, capsys, *words):
    code = tool.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_tags_of_a_table_are_counted_into_a_vocabulary(tools, tmp_path, capsys):
    table = write_table(tmp_path, count=24)
    (tmp_path / "synonyms.csv").write_text("word,tag\nTop,up\nupper,up\n")
    out = tmp_path / "made" / "v.json"
    words = ("tags", "--table", table, "--image", "file", "--out", out)
    more = ("--synonyms", tmp_path / "synonyms.csv")
    code, text = run(tools["prepare_dataset"], capsys, *words, *more)
    assert code == 0, text
    found = vocabulary.read(str(out))
    assert dict(zip(found.names, found.counts, strict=True)) == {"up": 12, "left": 12}
    assert found.ids(["top", "UPPER", "left"]) == (1, 0)
    assert "2 tags of 4 words, in 24 images" in text
    assert "without any tag: 6 images" in text and "at most 2" in text
    # Of the training images alone.
    run(tools["prepare_dataset"], capsys, *words, "--split_column", "part")
    part = [line.rpartition(",")[2] for line in table.read_text().splitlines()]
    assert vocabulary.read(str(out)).images == part.count("train") < 24


@pytest.mark.parametrize(
    "more, words",
    [
        (("--min_count", "13"), "a vocabulary of 0 tags (none) tells nothing apart"),
        (("--min_count", "0"), "--min_count 0: use 1 or more"),
        (("--only_listed",), "--only_listed needs --synonyms"),
        (("--tags", "tag"), 'Did you mean "tags"?'),
        (("--separator", ","), "holds the separator ','; 12 hold '|'"),
    ],
)
def test_a_vocabulary_that_cannot_be_made_is_refused(
    tools, tmp_path, capsys, more, words
):
    table = write_table(tmp_path, count=24)
    found = ("tags", "--table", table, "--image", "file", "--out", tmp_path / "v.json")
    code, text = run(tools["prepare_dataset"], capsys, *found, *more)
    assert code == 1 and words in text, text
    assert not (tmp_path / "v.json").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,b\n", "does not begin with word,tag"),
        ("word,tag\npuppy\n", r"row 2 is \['puppy'\]; expected a word and a tag"),
        ("word,tag\npuppy,dog\n#Puppy,cat\n", '"puppy" means dog and cat'),
    ],
)
def test_a_table_of_synonyms_that_is_none_is_refused(tools, tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        tools["tag_vocabulary"].read_synonyms(tmp_path / "s.csv")


def test_what_is_said_of_an_image_is_its_class_and_style(tools):
    noisy = tools["noisy_tags"]
    assert noisy.words_of_class("A") == ["a", "capital"]
    assert noisy.words_of_class("g") == ["g", "small"]
    assert noisy.words_of_class("7") == ["7", "digit"]
    assert noisy.words_of_class("T-shirt/top") == ["t", "shirt", "top"]
    assert noisy.styles("fonts/OpenSans-CondLightOblique.ttf#0") == [
        *("sans", "condensed", "light", "italic")
    ]


def test_writers_leave_out_vary_and_chatter_in_their_shares(tools):
    noisy = tools["noisy_tags"]
    writers = noisy.Writers(synonyms=3, missing=0.25, chatter=1.0, seed=5)
    said = [writers.write(["bold"], place) for place in range(4000)]
    assert said[7] == writers.write(["bold"], 7)
    assert said != [noisy.Writers(synonyms=3).write(["bold"], n) for n in range(4000)]
    words = [word for each in said for word in each]
    kept = [words.count("bold" + end) for end in noisy.ENDINGS[:3]]
    # 4 sd of a share of 4,000; the second of three synonyms half as often.
    assert abs(sum(kept) / 4000 - 0.75) < 0.03
    np.testing.assert_allclose(
        np.divide(kept, sum(kept)), [6 / 11, 3 / 11, 2 / 11], atol=0.04
    )
    chatter = [words.count(word) / 4000 for word in noisy.CHATTER]
    assert abs(sum(chatter) - 1) < 0.06 and chatter[0] > 1.7 * chatter[1] > 0
    assert {"bold", "boldpic", "boldlove"} | set(noisy.CHATTER) == set(words)


def test_classes_are_thinned_by_their_rank(tools):
    labels = np.repeat(np.arange(4), 120)
    kept = tools["noisy_tags"].thinned(labels, 1.0, seed=0)
    assert sorted(np.bincount(labels[kept])) == [30, 40, 60, 120]
    assert kept == tools["noisy_tags"].thinned(labels, 1.0, seed=0) == sorted(set(kept))
    assert tools["noisy_tags"].thinned(labels, 0.0, seed=0) == list(range(480))


def test_a_noisy_set_is_read_by_its_vocabulary(tools, tmp_path, capsys):
    splits = {"train": 96, "test": 8}
    prepare(tmp_path, "shapes", shape=(8, 8, 1), num_classes=4, splits=splits)
    made = ("shapes", "--data_dir", tmp_path, "--out", tmp_path, "--name", "said")
    how = ("--zipf", "1", "--synonyms", "2", "--missing", "0.3", "--chatter", "0.5")
    code, text = run(tools["noisy_tags"], capsys, *made, *how)
    assert code == 0, text
    source = Tfds(dataset="said", data_dir=str(tmp_path), keys=("tags",))
    assert len(source) == 24 + 12 + 8 + 6 and source.class_names == CLASSES
    assert all(isinstance(w, str) for i in range(50) for w in source[i]["tags"])
    table, out = tmp_path / "said" / "1.0.0" / "synonyms.csv", tmp_path / "v.json"
    words = ("tags", "--tfds", "said", "--data_dir", tmp_path, "--out", out)
    listed = ("--synonyms", table, "--only_listed")
    code, text = run(tools["prepare_dataset"], capsys, *words, *listed)
    assert code == 0 and "of 10 words, in 50 images" in text, text
    tags = Tags(source=source, vocabulary=str(out), max_tags=4)
    assert set(tags.class_names) == {"class", "0", "1", "2", "3"}
    # What is said of an image is of its class, whatever is left out.
    for index in range(len(tags)):
        example = tags[index]
        names = {tags.class_names[tag] for tag in example["label"] if tag >= 0}
        assert names <= {"class", str(source[index]["label"])}
    # The same command writes the same set.
    other = ("--out", tmp_path / "again", "--name", "said")
    assert run(tools["noisy_tags"], capsys, *made[:3], *other, *how)[0] == 0
    again = Tfds(dataset="said", data_dir=str(tmp_path / "again"), keys=("tags",))
    assert [again[i]["tags"] for i in range(50)] == [
        source[i]["tags"] for i in range(50)
    ]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--synonyms", "99"), "--synonyms 99: use 1"),
        (("--missing", "1"), "--missing 1.0 is to be a share below 1"),
        (("--zipf", "-1"), "--zipf -1.0 is an exponent"),
    ],
)
def test_shares_that_are_none_are_refused(tools, tmp_path, capsys, more, words):
    prepare(tmp_path, "shapes", shape=(8, 8, 1), num_classes=4, splits={"train": 8})
    made = ("shapes", "--data_dir", tmp_path, "--out", tmp_path, "--name", "said")
    code, text = run(tools["noisy_tags"], capsys, *made, *more)
    assert code == 1 and words in text


def picture(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (48, 40), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def folders(tmp_path):
    """A folder with "val" images that are also, or nearly, among those of "train"."""
    root = tmp_path / "images"
    for split, seeds in (("train", range(12)), ("val", range(100, 106))):
        for seed in seeds:
            place = root / split / "ab"[seed % 2]
            place.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(place / f"{seed}.png"), picture(seed))
    val = root / "val"
    (val / "a" / "same.png").write_bytes((root / "train" / "a" / "4.png").read_bytes())
    small = cv2.resize(picture(7), (24, 20), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(val / "b" / "small.jpg"), small)
    brighter = cv2.convertScaleAbs(picture(5), alpha=0.7, beta=40)
    cv2.imwrite(str(val / "b" / "brighter.png"), brighter)
    for split in ("train", "val"):
        flat = np.full((20, 20), 10 if split == "val" else 200, np.uint8)
        cv2.imwrite(str(root / split / "a" / "flat.png"), flat)
    (val / "a" / "broken.png").write_text("no image")
    return root


def test_duplicates_are_found_by_bytes_and_by_likeness(
    tools, folders, tmp_path, capsys, monkeypatch
):
    # More chunks than one.
    monkeypatch.setattr(tools["find_duplicates"], "CHUNK", 5)
    out = tmp_path / "same.csv"
    recipe = f"{CONFIGS}/folder.py:dir={folders},size=32"
    words = (f"--config={recipe}", f"--out={out}")
    code, text = run(tools["find_duplicates"], capsys, *words)
    assert code == 0, text
    assert "evaluators.val.source: 3 of 11 images (27.27%)" in text
    assert "1 of them the same file" in text and "1 images do not decode" in text
    rows = list(csv.DictReader(out.read_text().splitlines()))
    pairs = {
        (Path(row["image"]).name, Path(row["training_image"]).name) for row in rows
    }
    assert pairs == {
        ("same.png", "4.png"),
        ("small.jpg", "7.png"),
        ("brighter.png", "5.png"),
    }
    assert rows[0]["likeness"] == "1.0000" and Path(rows[0]["image"]).name == "same.png"
    assert len(read_names(str(out), "val")) == 3


def test_a_set_without_duplicates_has_a_row_that_says_so(
    tools, folders, tmp_path, capsys
):
    for name in ("a/same.png", "b/small.jpg", "b/brighter.png", "a/broken.png"):
        (folders / "val" / name).unlink()
    out = tmp_path / "same.csv"
    recipe = f"{CONFIGS}/folder.py:dir={folders},size=32"
    code, text = run(
        tools["find_duplicates"], capsys, f"--config={recipe}", "--out", out
    )
    assert code == 0 and "0 of 7 images" in text
    assert read_names(str(out), "val") == frozenset()


def test_a_comparison_that_cannot_be_made_is_refused(tools, tmp_path, capsys):
    words = ("--out", tmp_path / "same.csv", "--likeness", "1.5")
    code, text = run(tools["find_duplicates"], capsys, *words)
    assert code == 1 and "--likeness 1.5: use 0.995, at most 1" in text
    code, text = run(tools["find_duplicates"], capsys, "--config=no.py", *words[:2])
    assert code == 1 and "no.py" in text


def test_the_file_of_a_vocabulary_is_json_a_person_can_edit(tools):
    text = vocabulary.build([["dog", "sun"], ["dog"]]).text()
    assert json.loads(text)["tags"][0] == {"tag": "dog", "images": 2, "words": ["dog"]}
    assert len(text.splitlines()) == 4
