"""Sources: TFDS sets against tensorflow_datasets, folders, digits, arrays; messages."""

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from array_record.python import array_record_module
from prepared import labels_of

from big_vision_lite.data.sources import Digits, ImageFolder, InMemory, Tfds, listing
from big_vision_lite.data.sources.contents import merged
from big_vision_lite.data.sources.listing import hold_out
from big_vision_lite.data.sources.tfds import folder as tfds_folder
from big_vision_lite.data.sources.tfds import prepared_set, records
from big_vision_lite.data.sources.tfds.example import encode_example, parse_example
from big_vision_lite.data.sources.tfds.prepared_set import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

CLASSES = ("ant", "bee", "cat")
SHARDS = {"train": (5, 0, 7, 8), "test": (6,)}
FEATURES = "tensorflow_datasets.core.features"
IMAGE = {
    "pythonClassName": f"{FEATURES}.image_feature.Image",
    "image": {
        "dtype": "uint8",
        "encodingFormat": "png",
        "shape": {"dimensions": ["-1", "-1", "1"]},
    },
}
LABEL = {
    "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
    "classLabel": {"numClasses": "3"},
}
SEQUENCE = f"{FEATURES}.sequence_feature.Sequence"
DICT = f"{FEATURES}.features_dict.FeaturesDict"


def png(seed: int, side: int = 6) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_tfrecord(path: Path, rows: list[bytes]) -> None:
    with path.open("wb") as file:
        for row in rows:
            length = struct.pack("<Q", len(row))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(row + struct.pack("<I", masked_crc32c(row)))


def write_array_record(path: Path, rows: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


def write_set(
    data_dir: Path,
    file_format: str,
    name: str = "bugs",
    version: str = "1.0.0",
    label: dict = LABEL,
    label_of=lambda number: number % 3,
    class_names=CLASSES,
) -> Path:
    """Writes a set as TFDS lays it out, by hand; images differ, labels go round."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    name = name.partition("/")[0]
    write = {"tfrecord": write_tfrecord, "array_record": write_array_record}[
        file_format
    ]
    splits, number = [], 0
    for split, lengths in SHARDS.items():
        num_bytes = 0
        for shard, length in enumerate(lengths):
            rows = []
            for _ in range(length):
                features = {"image": png(number), "label": label_of(number)}
                rows.append(encode_example(features))
                number += 1
            num_bytes += sum(map(len, rows))
            file = f"{name}-{split}.{file_format}-{shard:05d}-of-{len(lengths):05d}"
            write(folder / file, rows)
        splits.append(
            {
                "name": split,
                "shardLengths": [str(n) for n in lengths],
                "numBytes": str(num_bytes),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {
        "name": name,
        "version": version,
        "fileFormat": file_format,
        "splits": splits,
        "releaseNotes": {version: "by hand"},
    }
    features = {"image": IMAGE, "label": label}
    whole = {"pythonClassName": DICT, "featuresDict": {"features": features}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(whole))
    if class_names:
        (folder / "label.labels.txt").write_text("\n".join(class_names) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture(params=["tfrecord", "array_record"])
def bugs(request, tmp_path):
    write_set(tmp_path, request.param)
    return tmp_path


def bugs_source(data_dir, split="train", **fields) -> Tfds:
    return Tfds(dataset="bugs", split=split, data_dir=str(data_dir), **fields)


# Prepared TFDS sets.


def test_a_tfds_set_gives_images_still_encoded_and_labels_in_order(bugs):
    source = bugs_source(bugs)
    assert len(source) == 20 and source.class_names == CLASSES
    for index in range(20):
        assert source[index] == {"image": png(index), "label": index % 3}
    np.testing.assert_array_equal(labels_of(source), np.arange(20) % 3)
    assert source[np.int64(6)] == source[6]
    with pytest.raises(IndexError):
        source[20]


def test_names_say_set_file_and_record(bugs):
    assert bugs_source(bugs).name(6).startswith("bugs: record 1 of bugs-train.")
    assert "-00002-of-00004" in bugs_source(bugs).name(6)


def test_array_record_equals_what_tensorflow_datasets_reads(tmp_path):
    folder = write_set(tmp_path, "array_record")
    builder = tfds.builder_from_directory(folder)
    keep = {"image": tfds.decode.SkipDecoding()}
    for split in ("train", "test[2:]", "train[10%:85%]"):
        theirs = builder.as_data_source(split, decoders=keep)
        ours = bugs_source(tmp_path, split)
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == {"image": other["image"], "label": other["label"]}
    assert ours.class_names == tuple(builder.info.features["label"].names)


def test_a_union_of_slices_is_their_concatenation(bugs):
    union = bugs_source(bugs, "train[:30%]+test+train[17:]")
    parts = [bugs_source(bugs, s) for s in ("train[:30%]", "test", "train[17:]")]
    expected = [example for part in parts for example in part]
    assert [union[i] for i in range(len(union))] == expected
    assert len(bugs_source(bugs, "all")) == 26


SLICES = [
    *("train", "test", "train[:99%]", "train[99%:]", "train[33%:66%]", "train[-5%:]"),
    *("train[:12.5%]", "train[10:20]", "train[:-3]", "train[-7:-2]", "train[1_0:]"),
    *("train[:2shard]", "train[1shard:]", "train[-1shard:]", "train[:-1shard]"),
    *("train[2shard]", "train[0shard]", "test[:50%]", "train[:50%]+test", "all"),
    *("train[0:20]", "train[:2.5%]", "train[:7.5%]", "test + train[:1]", "train[5:5]"),
    *("train[9:3]", "train[:0%]", "train[2:101%]", "train[:21]", "train[-21:]"),
    *("train[3]", "train[:]", "train[a:b]", "train[1:2:3]", "train[1.5:3]", "other"),
    *("train[", "", "train[5shard:]", "train[:9shard]", "+", "train[:0shard]"),
]


@pytest.mark.parametrize("lengths", [(5, 0, 7, 8), (1281, 1, 33), (60000,)])
def test_slices_mean_what_tfds_says(tmp_path, lengths, monkeypatch):
    monkeypatch.setitem(SHARDS, "train", (5, 0, 7, 8))
    folder = write_set(tmp_path, "tfrecord")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(n) for n in lengths]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    ours = load(folder)
    theirs = {
        name: tfds.core.SplitInfo(
            name=name, shard_lengths=[n for _, n in split.shards], num_bytes=0
        )
        for name, split in ours.splits.items()
    }
    refused = 0
    for spec in SLICES:
        try:
            absolute = tfds.core.ReadInstruction.from_spec(spec).to_absolute(theirs)
        except (ValueError, RuntimeError, TypeError):
            absolute = []
        expected = []
        for part in absolute:
            start, stop = part.from_ or 0, part.to
            stop = theirs[part.splitname].num_examples if stop is None else stop
            if start < stop:
                expected.append((part.splitname, start, stop))
        if not expected:
            refused += 1
            with pytest.raises(ValueError):
                ours.ranges(spec)
        else:
            got = [(r.split, r.start, r.stop) for r in ours.ranges(spec)]
            assert got == expected, spec
    assert refused >= 8


def test_examples_parse_as_tensorflow_datasets_parses_them():
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=300),
            "many": tfds.features.Sequence(np.int64),
            "score": tfds.features.Sequence(np.float32),
            "text": tfds.features.Text(),
        }
    )
    example = {
        "image": io.BytesIO(png(1)),
        "label": 259,
        "many": [0, -1, 127, 128, 2**40, -(2**62)],
        "score": [0.5, -2.0],
        "text": "naïve",
    }
    record = features.serialize_example(features.encode_example(example))
    parsed = parse_example(record, example)
    theirs = features.deserialize_example_np(record)
    assert parsed["label"] == [theirs["label"]] == [259]
    assert parsed["many"] == list(theirs["many"]) == example["many"]
    np.testing.assert_array_equal(parsed["score"], theirs["score"])
    assert parsed["text"] == [theirs["text"]] == ["naïve".encode()]
    assert parsed["image"] == [png(1)] and theirs["image"].shape == (6, 6, 3)
    # And back: what we write is what it reads.
    kept = {key: parsed[key] for key in ("label", "many")}
    again = {**kept, "image": parsed["image"][0], "text": parsed["text"][0]}
    assert parse_example(encode_example(again), again)["many"] == example["many"]


@pytest.mark.parametrize(
    "record", [b"\x0a\xff", b"hello, world", b"\x0a\x05\x0a", b"\xff"]
)
def test_other_bytes_are_no_example(record):
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        parse_example(record, ("image",))


def test_a_list_of_classes_becomes_a_multi_hot_vector(tmp_path):
    node = {"pythonClassName": SEQUENCE, "sequence": {"feature": LABEL, "length": "-1"}}
    write_set(tmp_path, "tfrecord", label=node, label_of=lambda n: list(range(n % 4)))
    source = bugs_source(tmp_path)
    assert source[0]["label"].dtype == np.float32
    np.testing.assert_array_equal(source[2]["label"], [1, 1, 0])
    np.testing.assert_array_equal(source[0]["label"], [0, 0, 0])
    assert labels_of(source).shape == (20, 3)


def test_features_in_the_older_form_are_read(tmp_path):
    folder = write_set(tmp_path, "tfrecord", class_names=())
    old = {
        "type": DICT,
        "content": {
            "image": {
                "type": IMAGE["pythonClassName"],
                "content": {"shape": [None, None, 3], "dtype": "uint8"},
            },
            "label": {"type": LABEL["pythonClassName"], "content": {"num_classes": 3}},
        },
    }
    (folder / "features.json").write_text(json.dumps(old))
    source = bugs_source(tmp_path)
    assert source.class_names == ("0", "1", "2") and source[4]["label"] == 1


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path):
    for version in ("1.9.0", "1.10.0"):
        write_set(tmp_path, "tfrecord", version=version)
    (tmp_path / "bugs" / "2.0.0.incomplete").mkdir()
    assert tfds_folder.find("bugs", str(tmp_path)).name == "1.10.0"
    named = Tfds(dataset="bugs:1.9.0", data_dir=str(tmp_path))
    assert len(named) == 20
    with pytest.raises(
        FileNotFoundError, match=r"no version '3\.0\.0'.*1\.10\.0, 1\.9"
    ):
        len(Tfds(dataset="bugs:3.0.0", data_dir=str(tmp_path)))


def test_a_set_with_configs_wants_one_named(tmp_path):
    write_set(tmp_path, "tfrecord", name="bugs/small")
    info = tmp_path / "bugs" / "small" / "1.0.0" / "dataset_info.json"
    assert len(load(info.parent).splits) == 2
    assert len(Tfds(dataset="bugs/small", data_dir=str(tmp_path))) == 20
    with pytest.raises(FileNotFoundError, match="sets there: bugs/small"):
        len(Tfds(dataset="ants", data_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="bugs/small"):
        len(Tfds(dataset="bugs", data_dir=str(tmp_path)))


def test_the_data_dir_comes_from_the_environment(bugs, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(bugs))
    assert len(Tfds(dataset="bugs")) == 20
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(bugs))
    with pytest.raises(
        FileNotFoundError, match="tensorflow_datasets: that folder does"
    ):
        len(Tfds(dataset="bugs"))
    with pytest.raises(ValueError, match="not a local path"):
        len(Tfds(dataset="bugs", data_dir="gs://bucket/sets"))


def test_a_set_not_prepared_is_named_with_what_is_there(bugs):
    with pytest.raises(FileNotFoundError) as error:
        len(Tfds(dataset="bug", data_dir=str(bugs)))
    message = str(error.value)
    assert f"bug is not prepared in {bugs}: sets there: bugs" in message
    assert 'Did you mean "bugs"?' in message
    assert f"tools/prepare_dataset.py tfds bug --data_dir {bugs}" in message


def test_imagenet_not_prepared_says_which_tars_are_missing(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(FileNotFoundError) as error:
        len(Tfds(dataset="imagenet2012", data_dir=str(tmp_path)))
    assert "ILSVRC2012_img_train.tar (missing)" in str(error.value)
    assert "ILSVRC2012_img_val.tar (found)" in str(error.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", "no split 'trian'; its splits: train, test. Did you mean \"train\""),
        ("train[7:7]", "holds no example; the splits hold: train 20, test 6"),
        ("train[:1000]", r"slice \[0:1000\] .*beyond its 20 examples"),
        ("train[3]", "cannot read split='train.3.'; write a split or a slice"),
    ],
)
def test_a_wrong_split_is_refused(bugs, split, message):
    with pytest.raises(ValueError, match=message):
        len(bugs_source(bugs, split))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_key": "img"},
            r"image_key='img' does not exist.*images there: image\.",
        ),
        ({"image_key": "label"}, "image_key='label' is not an image feature"),
        (
            {"label_key": "labels"},
            "label_key='labels' does not.*Did you mean \"label\"",
        ),
        ({"label_key": "image"}, "label_key='image' is not a class label"),
    ],
)
def test_a_wrong_feature_is_refused(bugs, fields, message):
    with pytest.raises(ValueError, match=message):
        _ = bugs_source(bugs, **fields).class_names


def test_hidden_labels_are_refused_with_the_record(tmp_path):
    write_set(tmp_path, "tfrecord", label_of=lambda n: -1 if n == 3 else 0)
    with pytest.raises(ValueError, match=r"record 3 of .*label=\[-1\].*0 to 2.*hidden"):
        bugs_source(tmp_path)[3]


def test_float_images_and_unknown_file_formats_are_refused(tmp_path):
    folder = write_set(tmp_path, "tfrecord")
    text = (folder / "features.json").read_text()
    (folder / "features.json").write_text(text.replace("uint8", "float32"))
    with pytest.raises(ValueError, match="float32 pixels"):
        _ = bugs_source(tmp_path).class_names
    text = (folder / "dataset_info.json").read_text()
    changed = text.replace('"fileFormat": "tfrecord"', '"fileFormat": "parquet"')
    (folder / "dataset_info.json").write_text(changed)
    with pytest.raises(ValueError, match="stores 'parquet' files"):
        len(bugs_source(tmp_path))


def test_class_names_must_fit_their_number(tmp_path):
    write_set(tmp_path, "tfrecord", class_names=("ant", "bee"))
    with pytest.raises(ValueError, match="names 2 classes, features.json counts 3"):
        _ = bugs_source(tmp_path).class_names


@pytest.mark.parametrize("cut", [0, 20, -1, -40])
def test_a_record_file_cut_short_is_named(bugs, cut):
    path = next(bugs.glob("bugs/1.0.0/bugs-train*-00002-of-00004"))
    os.truncate(path, cut if cut >= 0 else path.stat().st_size + cut)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*counts 7 records"):
        len(bugs_source(bugs))
    assert len(bugs_source(bugs, "test")) == 6


def test_a_file_cut_short_is_found_at_once_among_many(tmp_path, monkeypatch):
    folder = write_set(tmp_path, "tfrecord")
    path = next(folder.glob("*train*-00002-of-00004"))
    monkeypatch.setattr(prepared_set, "FEW_FILES", 1)
    assert len(bugs_source(tmp_path)) == 20
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        len(bugs_source(tmp_path))


def test_missing_record_files_and_json_are_named(bugs):
    path = next(bugs.glob("bugs/1.0.0/bugs-train*-00003-of-00004"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 record files.*{path.name}"):
        len(bugs_source(bugs))
    (path.parent / "features.json").write_text("{")
    with pytest.raises(ValueError, match="features.json is not JSON"):
        len(bugs_source(bugs))
    (path.parent / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match="features.json is missing"):
        len(bugs_source(bugs))


def test_a_flipped_byte_in_an_array_record_is_an_error_with_the_record(tmp_path):
    folder = write_set(tmp_path, "array_record")
    path = next(folder.glob("*train*-00000-of-00004"))
    data = bytearray(path.read_bytes())
    data[data.index(png(2)) + 30] ^= 1
    path.write_bytes(data)
    source = bugs_source(tmp_path)
    with pytest.raises(OSError, match=f"record 2 of .*{path.name}.*hash mismatch"):
        source[2]
    assert source[1]["label"] == 1 and source[3]["label"] == 0


def test_many_threads_read_what_one_reads(bugs):
    source = bugs_source(bugs, "train+test")
    indices = np.random.default_rng(0).integers(0, 26, 300).tolist()
    alone = [source[index] for index in range(26)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        examples = list(pool.map(source.__getitem__, indices))
    assert examples == [alone[index] for index in indices]


def test_the_fingerprint_knows_the_set_and_not_its_place_or_format(tmp_path):
    for file_format in ("tfrecord", "array_record"):
        write_set(tmp_path / file_format, file_format)
    shutil.copytree(tmp_path / "tfrecord", tmp_path / "moved")
    prints = {
        bugs_source(tmp_path / place).fingerprint
        for place in ("tfrecord", "array_record", "moved")
    }
    assert len(prints) == 1
    prints |= {bugs_source(tmp_path / "moved", s).fingerprint for s in ("test", "all")}
    labels = tmp_path / "moved" / "bugs" / "1.0.0" / "label.labels.txt"
    labels.write_text("ant\nbee\ncow\n")
    prints.add(bugs_source(tmp_path / "moved").fingerprint)
    assert len(prints) == 4


def test_reading_imports_no_large_library(bugs):
    code = (
        "import sys; from big_vision_lite.data.sources import Digits, Tfds\n"
        f"s = Tfds(dataset='bugs', data_dir={str(bugs)!r}); s[0], s[19]\n"
        "Digits()[0]\n"
        "large = ('tensorflow', 'tensorflow_datasets', 'jax', 'torch', 'pandas', "
        "'sklearn', 'cv2')\n"
        "print([name for name in large if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# Image folders.


def put(path: Path, data: bytes = b"image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def plain(tmp_path):
    root = tmp_path / "my pictures é"
    for number in range(40):
        suffix = ("jpg", "JPEG", "png", "WebP", "bmp")[number % 5]
        put(root / "dög" / f"sub {number % 2}" / f"{number}.{suffix}", b"%d" % number)
        put(root / "cat" / f"{number}.png")
    return root


def test_a_folder_of_classes_gives_files_and_labels(plain):
    source = ImageFolder(path=str(plain), split="all")
    assert len(source) == 80 and source.class_names == ("cat", "dög")
    for index in range(80):
        path = Path(source.name(index))
        label = source.class_names.index(path.relative_to(plain).parts[0])
        assert source[index] == {"image": path.read_bytes(), "label": label}
    assert len({source.name(index) for index in range(80)}) == 80


@pytest.mark.parametrize("seed", [0, 7])
def test_hashed_splits_are_disjoint_whole_and_a_tenth_of_each_class(plain, seed):
    train, val = (
        ImageFolder(path=str(plain), split=split, split_seed=seed)
        for split in ("train", "val")
    )
    names = [{s.name(i) for i in range(len(s))} for s in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 80
    np.testing.assert_array_equal(np.bincount(labels_of(val)), [4, 4])


def test_every_seed_holds_out_other_files(plain):
    for split in ("train", "val"):
        sources = [
            ImageFolder(path=str(plain), split=split, split_seed=seed)
            for seed in (*range(5), 2**32 - 1)
        ]
        listed = {
            tuple(source.relative_path(index) for index in range(len(source)))
            for source in sources
        }
        assert len(listed) == len({source.fingerprint for source in sources}) == 6
    sizes = {
        len(ImageFolder(path=str(plain), split="all", split_seed=s)) for s in (0, 3)
    }
    assert sizes == {80}
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"split_seed={seed} is outside 0 to"):
            ImageFolder(path=str(plain), split_seed=seed)


@pytest.mark.parametrize("seed", [0, 7])
def test_hashed_splits_do_not_depend_on_order_or_place(
    plain, tmp_path, monkeypatch, seed
):
    def held(root):
        source = ImageFolder(path=str(root), split="val", split_seed=seed)
        return [source.relative_path(i) for i in range(len(source))]

    first = held(plain)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in reversed(sorted(plain.rglob("*.*"))):
        put(moved / path.relative_to(plain), path.read_bytes())
    assert held(moved) == first
    scan = os.scandir

    class Backwards:
        def __init__(self, folder):
            with scan(folder) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(listing.os, "scandir", Backwards)
    assert held(plain) == first


def test_the_held_out_files_are_pinned():
    files = {"a": [f"a/{number}.jpg" for number in range(20)], "b": ["b/only.jpg"]}
    train, held = hold_out(files, 0)
    assert held == {"a": ["a/3.jpg", "a/14.jpg"]} and train["b"] == ["b/only.jpg"]
    assert hold_out(files, 1)[1] == {"a": ["a/5.jpg", "a/12.jpg"]}
    assert sorted(train["a"] + held["a"]) == sorted(files["a"])


@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_split_folders_are_taken_as_they_are(tmp_path, val):
    for split, number in (("train", 3), (val, 2), ("test", 1)):
        for index in range(number):
            for name in ("b", "a"):
                put(tmp_path / split / name / f"{index}.jpg")
    for split, number in (("train", 6), ("val", 4), ("validation", 4), ("test", 2)):
        source = ImageFolder(path=str(tmp_path), split=split)
        assert len(source) == number and source.class_names == ("a", "b")
    assert len(ImageFolder(path=str(tmp_path), split="all")) == 12


def test_other_files_are_skipped_and_counted(plain):
    put(plain / "notes.txt")
    put(plain / "cat" / ".hidden.jpg")
    put(plain / ".git" / "a.jpg")
    put(plain / "__MACOSX" / "cat" / "._0.jpg")
    put(plain / "loose.jpg")
    put(plain / "cat" / "README")
    (plain / "cat" / "gone.jpg").symlink_to(plain / "nowhere")
    (plain / "cat" / "loop").symlink_to(plain / "cat")
    source = ImageFolder(path=str(plain), split="all")
    assert len(source) == 80
    assert str(merged(source.left_out.values())) == (
        "1 .txt files, 2 files and folders of systems and editors, 1 files without a "
        "suffix, 1 hidden files and folders, 1 images outside a class folder, 1 links "
        "to a folder above, 1 links to nothing"
    )


def test_pinned_classes_keep_their_order_and_warn_of_gaps_once(plain, caplog):
    classes = ("dög", "zebra", "cat")
    source = ImageFolder(path=str(plain), classes=classes)
    assert source.class_names == classes
    assert set(labels_of(source)) == {0, 2}
    assert [record.message for record in caplog.records] == [
        f"train of {plain} has 2 of the 3 train classes (missing: zebra); indices "
        "follow train."
    ]


def test_labels_of_an_evaluation_split_follow_training(tmp_path, caplog):
    for name in ("a", "b", "c"):
        put(tmp_path / "train" / name / "0.jpg")
    put(tmp_path / "val" / "c" / "0.jpg")
    source = ImageFolder(path=str(tmp_path), split="val")
    assert source[0]["label"] == 2 and "1 of the 3 train classes" in caplog.text


def test_a_class_unknown_to_training_stops(tmp_path):
    for path in ("train/cat", "train/dog", "val/cat", "val/Dogs", "val/emu"):
        put(tmp_path / path / "0.jpg")
    with pytest.raises(ValueError, match="2 classes unknown to training: Dogs, emu"):
        len(ImageFolder(path=str(tmp_path), split="val"))
    with pytest.raises(ValueError, match="1 classes unknown to training: dog"):
        len(ImageFolder(path=str(tmp_path), classes=("cat", "emu")))


def test_one_spelling_of_accents(tmp_path):
    for path in ("train/caf\u00e9", "train/tea", "val/cafe\u0301"):
        put(tmp_path / path / "0.jpg")
    source = ImageFolder(path=str(tmp_path), split="val")
    assert source.class_names == ("caf\u00e9", "tea") and source[0]["label"] == 0


def test_wrong_folders_are_refused_with_what_is_there(tmp_path):
    def refused(error, match, path=tmp_path, split="train"):
        with pytest.raises(error, match=match):
            len(ImageFolder(path=str(path), split=split))

    (tmp_path / "flowers").mkdir()
    refused(
        FileNotFoundError, 'no folder .*Did you mean "flowers"', tmp_path / "flower"
    )
    refused(
        FileNotFoundError, "has no 'a'; folders there: flowers", tmp_path / "a" / "b"
    )
    refused(FileNotFoundError, "holds no images .*found there: 1 folders without an")
    put(tmp_path / "loose.jpg")
    refused(NotADirectoryError, "is a file, not a folder", tmp_path / "loose.jpg")
    refused(FileNotFoundError, "1 images outside a class folder. Give each class")
    put(tmp_path / "flowers" / "0.jpg")
    refused(ValueError, r"has one class \(flowers\); two or more")
    put(tmp_path / "trees" / "0.jpg")
    refused(FileNotFoundError, "its splits are train and val", split="test")
    put(tmp_path / "train" / "a" / "0.jpg")
    refused(ValueError, r"mixes split folders \(train\) with.*\(flowers, trees\)")


def test_wrong_split_folders_are_refused(tmp_path):
    for path in ("train/a", "train/b", "val/a"):
        put(tmp_path / path / "0.jpg")
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="no images of split 'test'; it has"):
        len(ImageFolder(path=str(tmp_path), split="test"))
    put(tmp_path / "validation" / "a" / "0.jpg")
    with pytest.raises(ValueError, match="two folders for one split"):
        len(ImageFolder(path=str(tmp_path)))
    direct = tmp_path / "direct"
    put(direct / "train" / "0.jpg")
    put(direct / "test" / "0.jpg")
    with pytest.raises(
        ValueError, match="(?s)lie directly in test, train;.*: give each class"
    ):
        len(ImageFolder(path=str(direct)))
    alone = tmp_path / "alone"
    put(alone / "val" / "a" / "0.jpg")
    with pytest.raises(ValueError, match="no folder train to take the classes from"):
        len(ImageFolder(path=str(alone), split="val"))
    pinned = ImageFolder(path=str(alone), split="val", classes=("a", "b"))
    assert len(pinned) == 1


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        put(tmp_path / name / "0.jpg")
    assert ImageFolder(path=str(tmp_path)).class_names == ("bus", "car", "train")


def test_wrong_fields_are_refused_at_once():
    with pytest.raises(ValueError, match="'tran' of an image folder.*mean \"train\""):
        ImageFolder(path="x", split="tran")
    with pytest.raises(ValueError, match="names b twice"):
        ImageFolder(path="x", classes=("a", "b", "b"))
    with pytest.raises(ValueError, match="'val' of the digits is none of train, test"):
        Digits(split="val")


def test_the_folder_fingerprint_follows_names_not_the_place(plain, tmp_path):
    first = ImageFolder(path=str(plain)).fingerprint
    moved = plain.rename(tmp_path / "moved")
    assert ImageFolder(path=str(moved)).fingerprint == first
    classes = ("dög", "cat")
    assert ImageFolder(path=str(moved), classes=classes).fingerprint != first
    put(moved / "cat" / "new.jpg")
    assert ImageFolder(path=str(moved), split="all").fingerprint != first


def test_reading_is_tried_again_then_fails_with_the_name(plain, monkeypatch):
    source = ImageFolder(path=str(plain), split="all")
    expected, calls = source[3], []

    def flaky(file, *arguments, **named):
        calls.append(file)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return real(file, *arguments, **named)

    real = open
    monkeypatch.setattr("builtins.open", flaky)
    assert source[3] == expected and len(calls) == 3
    monkeypatch.undo()
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.0,))
    os.unlink(source.name(3))
    with pytest.raises(
        OSError, match=r"cannot read .*cat.*tried 2 times.*No such file"
    ):
        source[3]


# Pickles, digits, arrays.


def test_a_pickle_holds_the_fields_only_and_reads_the_same(bugs, plain):
    sources = (
        bugs_source(bugs, "train[:50%]"),
        ImageFolder(path=str(plain)),
        Digits(split="test"),
    )
    for source in sources:
        example, fingerprint = source[5], source.fingerprint
        data = pickle.dumps(source)
        assert len(data) < 500
        copy = pickle.loads(data)
        assert copy == source and copy.fingerprint == fingerprint
        np.testing.assert_array_equal(copy[5]["image"], example["image"])
        assert copy.name(5) == source.name(5)


def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    ours = [Digits(split=split) for split in ("train", "test")]
    assert [len(source) for source in ours] == [1438, 359]
    examples = [example for source in ours for example in source]
    images = np.stack([example["image"] for example in examples])
    expected = np.round(theirs.images * 255 / 16)[..., None]
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    np.testing.assert_array_equal(images, expected)
    assert [example["label"] for example in examples] == theirs.target.tolist()
    assert ours[0].fingerprint != ours[1].fingerprint
    assert ours[0].name(7) == "digits train: image 7"


def test_arrays_are_a_source():
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    source = InMemory(images, np.asarray([1, 0]), ("a", "b"))
    np.testing.assert_array_equal(source[1]["image"], images[1])
    assert source[0]["label"] == 1 and source.name(1) == "image 1 of an array"
    floats = InMemory(images.astype(np.float32) + 0.25, np.asarray([1, 0]), ("a", "b"))
    np.testing.assert_array_equal(floats[1]["image"], images[1])
    gray = InMemory(images[..., 0], np.asarray([[1, 0], [1, 1]]), ("a", "b"))
    assert gray[0]["image"].shape == (4, 5, 1)
    np.testing.assert_array_equal(gray[1]["label"], np.ones(2, np.float32))
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
    assert len({s.fingerprint for s in (source, gray)}) == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.full((2, 4, 4), np.nan), [0, 1], "NaN or infinity, first in image 0"),
        (np.ones((2, 4, 4)) * [[[1]], [[np.inf]]], [0, 1], "first in image 1"),
        (np.full((2, 4, 4), 0.5), [0, 1], "values 0.5 to 0.5; expected 0..255"),
        (np.full((2, 4, 4), 256), [0, 1], "values 256 to 256"),
        (np.full((2, 4, 4), -1.0), [0, 1], "values -1 to -1"),
        (
            np.zeros((2, 4), np.uint8),
            [0, 1],
            r"shape \(2, 4\); expected \[N, H, W, C\]",
        ),
        (np.zeros((2, 4, 4), "U1"), [0, 1], "expected uint8 or float"),
        (
            np.zeros((2, 4, 4), np.uint8),
            [0, 2],
            r"labels\[1\]=2 is out of range, as are 1",
        ),
        (np.zeros((2, 4, 4), np.uint8), [-1, 5], r"labels\[0\]=-1 .*as are 2"),
        (np.zeros((2, 4, 4), np.uint8), [0], r"shape \(1,\) for 2 images"),
        (np.zeros((2, 4, 4), np.uint8), [[0, 2], [0, 1]], "must be 0 or 1"),
        (np.zeros((2, 4, 4), np.uint8), [[1], [0]], "one column for each of the 2"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        InMemory(images, np.asarray(labels), ("a", "b"))
