"""Sources without labels, with masks, boxes and text; what TFDS wrote, read by us."""

import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from big_vision_lite.data import ops
from big_vision_lite.data.sources import ImageFolder, InMemory, Tfds
from big_vision_lite.data.sources.arrays import content_hash
from big_vision_lite.data.sources.contents import merged
from big_vision_lite.data.sources.folder import folder_splits
from big_vision_lite.data.sources.tfds import prepared_set
from big_vision_lite.recipes import serialize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 5


def rng(seed=0):
    return np.random.default_rng(seed)


def encoded(extension: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(extension, pixels)[1].tobytes()


def kinds():
    """A feature of every kind, as TFDS declares them."""
    f = tfds.features
    objects = {
        "bbox": f.BBoxFeature(),
        "label": f.ClassLabel(names=["cat", "dog"]),
        "area": np.int64,
        "crowd": np.bool_,
        "name": f.Text(),
    }
    return f.FeaturesDict(
        {
            "image": f.Image(encoding_format="jpeg"),
            "label": f.ClassLabel(num_classes=3),
            "segmentation_mask": f.Image(
                shape=(None, None, 1), encoding_format="png", use_colormap=True
            ),
            "objects": f.Sequence(objects),
            "head": f.BBoxFeature(),
            "caption": f.Text(),
            "captions": f.Sequence(f.Text()),
            "score": f.Scalar(np.float32),
            "age": f.Scalar(np.uint8),
            "matrix": f.Tensor(shape=(2, 3), dtype=np.float64),
            "points": f.Tensor(shape=(None, 2), dtype=np.float32),
            "pairs": f.Sequence(f.Tensor(shape=(2,), dtype=np.int32)),
            "three": f.Sequence(np.int64, length=3),
            "raw": f.Tensor(shape=(), dtype=np.bytes_),
            "ragged": f.Sequence(f.Sequence(np.int64)),
            "packed": f.Tensor(shape=(2,), dtype=np.int32, encoding="zlib"),
            "frames": f.Sequence(f.Image()),
            "corners": f.BBoxFeature(bbox_format="XYXY"),
        }
    )


# Not written: records without them are as good for refusing them.
REFUSED = ("ragged", "packed", "frames", "corners")


def example_of(number: int) -> dict:
    generator = rng(number)
    boxes = np.sort(generator.random((2, number, 2)), axis=0)
    objects = [
        {
            "bbox": tfds.features.BBox(*map(float, (*low, *high))),
            "label": place % 2,
            "area": 2**33 + place,
            "crowd": place % 2 == 0,
            "name": f"näme {place}",
        }
        for place, (low, high) in enumerate(zip(*boxes, strict=True))
    ]
    mask = generator.integers(0, 4, (30, 40, 1)).astype(np.uint8)
    return {
        "image": io.BytesIO(encoded(".jpg", generator.integers(0, 255, (30, 40, 3)))),
        "label": number % 3,
        "segmentation_mask": io.BytesIO(encoded(".png", mask)),
        "objects": objects,
        "head": tfds.features.BBox(0.25, 0.0, 1.0, 0.5),
        "caption": f"a phöto {number}",
        "captions": [f"{number}.{i}" for i in range(number)],
        "score": number / 8,
        "age": 200 + number,
        "matrix": generator.random((2, 3)),
        "points": generator.random((number, 2)).astype(np.float32),
        "pairs": [np.array([i, -i], np.int32) for i in range(number)],
        "three": [number, -1, 2**40],
        "raw": b"\xff\0" * number + b"end",
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set as TFDS itself describes and encodes it, without TensorFlow."""
    data_dir = tmp_path_factory.mktemp("sets")
    folder = data_dir / "scenes" / "1.0.0"
    folder.mkdir(parents=True)
    kinds().save_config(folder)
    there = tfds.features.FeaturesDict(
        {key: value for key, value in kinds().items() if key not in REFUSED}
    )
    records = [
        there.serialize_example(there.encode_example(example_of(number)))
        for number in range(COUNT)
    ]
    path = folder / "scenes-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    split = {
        "name": "train",
        "shardLengths": [str(COUNT)],
        "numBytes": str(path.stat().st_size),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "scenes", "version": "1.0.0", "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": [split]}))
    return data_dir, records, there


def scenes(data_dir, **fields) -> Tfds:
    return Tfds(dataset="scenes", data_dir=str(data_dir), **fields)


ALL_KEYS = (
    "segmentation_mask=>mask",
    "objects/bbox=>boxes",
    "objects/label=>box_label",
    *("objects/area", "objects/crowd", "objects/name", "head", "caption", "captions"),
    *("score", "age", "matrix", "points", "pairs", "three", "raw"),
)


def test_every_kind_of_feature_is_what_tensorflow_datasets_reads(written):
    data_dir, records, features = written
    source = scenes(data_dir, keys=ALL_KEYS)
    assert len(source) == COUNT and source.class_names == ("0", "1", "2")
    for number in range(COUNT):
        ours, wrote = source[number], example_of(number)
        theirs = features.deserialize_example_np(records[number])
        assert set(ours) == {"image", "label"} | {
            pair.rpartition(">")[2] for pair in ALL_KEYS
        }
        assert ours["image"] == wrote["image"].getvalue()
        assert ours["mask"] == wrote["segmentation_mask"].getvalue()
        assert ours["label"] == theirs["label"] and isinstance(ours["label"], int)
        nested = {"boxes": "bbox", "box_label": "label"}
        nested |= {f"objects/{name}": name for name in ("area", "crowd")}
        for key, name in nested.items():
            # TFDS forgets the sides of an empty list.
            read = np.reshape(theirs["objects"][name], ours[key].shape)
            np.testing.assert_array_equal(ours[key], read)
        assert ours["boxes"].shape == (number, 4) and ours["boxes"].dtype == np.float32
        assert ours["objects/crowd"].dtype == bool
        assert ours["objects/name"] == [item["name"] for item in wrote["objects"]]
        np.testing.assert_array_equal(ours["head"], [0.25, 0.0, 1.0, 0.5])
        assert ours["caption"] == wrote["caption"] == theirs["caption"].decode()
        assert ours["captions"] == wrote["captions"]
        assert ours["score"] == wrote["score"] and ours["age"] == wrote["age"]
        assert ours["raw"] == wrote["raw"]
        for key in ("matrix", "points", "three"):
            np.testing.assert_array_equal(ours[key], theirs[key])
            assert ours[key].shape == np.shape(wrote[key])
        pairs = np.reshape(wrote["pairs"], (-1, 2))
        np.testing.assert_array_equal(ours["pairs"], pairs)
        assert ours["pairs"].dtype == np.int32 and ours["matrix"].dtype == np.float32


def test_keys_reach_a_batch_decoded_and_padded(written):
    source = scenes(written[0], label_key=None, keys=ALL_KEYS[:3])
    assert source.class_names == ()
    chain = (
        ops.Decode(),
        ops.InceptionCrop(size_px=16),
        ops.Pad(key="boxes", length=3),
        ops.Pad(key="box_label", length=3, value=-1.0),
    )
    for number in range(COUNT):
        example = source[number]
        for op in chain:
            example = op(example, rng(number))
        assert set(example) == {"image", "mask", "boxes", "box_label"}
        assert example["mask"].shape == (16, 16) and example["mask"].max() < 4
        assert example["boxes"].shape == (3, 4)
        assert (example["box_label"] >= 0).sum() == min(number, 3)


def test_a_set_may_be_text_only_and_names_can_take_the_place_of_a_label(written):
    source = scenes(written[0], image_key=None, label_key=None, keys=("caption",))
    assert source[3] == {"caption": "a phöto 3"}
    aged = scenes(written[0], label_key=None, keys=("age=>label",))
    assert aged[2]["label"] == 202 and aged.class_names == ()
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_fingerprints_know_keys_and_are_as_before_without_them(written):
    data_dir = written[0]
    # As it was computed before there were keys.
    plain = scenes(data_dir)
    (path,) = data_dir.glob("*/*/*array_record*")
    ranges = [prepared_set.Range(split="train", start=0, stop=COUNT)]
    counts = [[path.stat().st_size, [COUNT]]]
    keys, classes = ("image", "label"), ("0", "1", "2")
    before = ("scenes", "1.0.0", keys, classes, ranges, counts)
    assert plain.fingerprint == content_hash(map(repr, before))
    others = [
        {"keys": ("caption",)},
        {"keys": ("caption=>text",)},
        {"label_key": None},
        {"label_key": None, "image_key": None, "keys": ("caption",)},
    ]
    prints = {scenes(data_dir, **fields).fingerprint for fields in others}
    assert len(prints | {plain.fingerprint}) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("segmentation",), "'segmentation' does not exist.*Did you mean \"segmentat"),
        (("objects/box",), r"'objects/box' does not.*objects/bbox"),
        (("ragged",), "'ragged' .* in lists of a form that is not read"),
        (("packed",), "'packed' .* is a Tensor of a form that is not read"),
        (("frames",), "'frames' .* is a Image in lists"),
        (("corners",), "'corners' .* is a BBoxFeature .*boxes of REL_YXYX"),
        (("objects",), "'objects' .* is a FeaturesDict in lists"),
    ],
)
def test_features_that_are_not_read_are_named(written, keys, message):
    with pytest.raises(ValueError, match=message):
        scenes(written[0], keys=keys)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": ("=>mask",)}, 'not of the form "feature" or "feature=>name"'),
        ({"keys": ("a=>b", "c=>b")}, '"b" would be written twice; give one'),
        ({"keys": ("other=>image",)}, '"image" would be written twice'),
        ({"image_key": None, "label_key": None}, "reads nothing; name the features"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        Tfds(dataset="scenes", **fields)


def test_a_record_without_a_value_is_named(written, tmp_path):
    data_dir = written[0]
    folder = data_dir / "scenes" / "1.0.0"
    text = (folder / "features.json").read_text()
    other = tmp_path / "scenes" / "1.0.0"
    other.mkdir(parents=True)
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    features = json.loads(text)
    inner = features["featuresDict"]["features"]
    inner["absent"] = inner["score"]
    inner["matrix"]["tensor"]["shape"]["dimensions"] = ["4", "3"]
    (other / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match="record 1 of .* has 0 values of 'absent'"):
        scenes(tmp_path, keys=("absent",))[1]
    with pytest.raises(ValueError, match=r"6 values of 'matrix'; .*shape \[4, 3\]"):
        scenes(tmp_path, keys=("matrix",))[1]


# Folders without labels.


@pytest.fixture
def loose(tmp_path):
    root = tmp_path / "pictures ü"
    for number in range(30):
        path = root / ("" if number % 3 else f"deep/{number % 2}") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    (root / "notes.txt").write_text("x")
    return root


def names(source):
    return {source.relative_path(index) for index in range(len(source))}


def test_a_folder_without_labels_gives_every_image_at_any_depth(loose):
    source = ImageFolder(path=str(loose), split="all", labels=False)
    assert source.class_names == () and len(source) == 30
    assert names(source) == {
        str(path.relative_to(loose)) for path in loose.rglob("*.jpg")
    }
    for index in range(30):
        path = pathlib.Path(source.name(index))
        assert source[index] == {"image": path.read_bytes()}
    assert str(merged(source.left_out.values())) == "1 .txt files"


def test_a_tenth_is_held_out_by_a_hash_and_the_rest_trains(loose):
    parts = [
        names(ImageFolder(path=str(loose), split=split, labels=False, split_seed=seed))
        for seed in (0, 1)
        for split in ("train", "val")
    ]
    assert [len(part) for part in parts] == [27, 3, 27, 3]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 30
    assert parts[1] != parts[3]
    with pytest.raises(FileNotFoundError, match="train and val .a tenth. and all"):
        len(ImageFolder(path=str(loose), split="test", labels=False))


@pytest.mark.parametrize("below", ["", "anything/at all"])
def test_split_folders_are_taken_whatever_is_in_them(tmp_path, below):
    for split, count in (("train", 4), ("validation", 2)):
        folder = tmp_path / split / below
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(b"x")
    (tmp_path / "cover.png").write_bytes(b"x")
    train, val = (
        ImageFolder(path=str(tmp_path), split=split, labels=False)
        for split in ("train", "val")
    )
    assert (len(train), len(val)) == (4, 2)
    assert all(name.startswith("train" + os.sep) for name in names(train))
    assert str(merged(train.left_out.values())) == "1 images outside a split folder"
    assert len(ImageFolder(path=str(tmp_path), split="all", labels=False)) == 6
    assert set(folder_splits(str(tmp_path), labels=False)) == {"train", "val"}
    with pytest.raises(FileNotFoundError, match="no images of split 'test'"):
        len(ImageFolder(path=str(tmp_path), split="test", labels=False))
    with pytest.raises(ValueError, match="split_seed=1 chooses nothing"):
        len(ImageFolder(path=str(tmp_path), labels=False, split_seed=1))


def test_a_folder_of_classes_is_images_too_and_another_fingerprint(tmp_path):
    for name in ("bus", "train"):  # A class that has the name of a split.
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(b"x")
    with_labels = ImageFolder(path=str(tmp_path), split="all")
    without = ImageFolder(path=str(tmp_path), split="all", labels=False)
    assert names(with_labels) == names(without) and len(without) == 6
    assert with_labels.fingerprint != without.fingerprint
    assert pickle.loads(pickle.dumps(without)).fingerprint == without.fingerprint


def test_classes_without_labels_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mean nothing with labels=False"):
        ImageFolder(path="x", classes=("a", "b"), labels=False)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no images .*for train; .*1 .txt"):
        len(ImageFolder(path=str(tmp_path), labels=False))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        len(ImageFolder(path=str(tmp_path / "gone"), labels=False))


def test_new_fields_survive_the_round_trip_through_json():
    for source in (
        Tfds(dataset="a", label_key=None, keys=("objects/bbox=>boxes", "caption")),
        Tfds(dataset="a", image_key=None, label_key=None, keys=("caption",)),
        ImageFolder(path="x", labels=False),
    ):
        assert serialize.from_json(serialize.to_json(source)) == source


# Arrays.


def test_arrays_carry_further_keys_and_need_no_label():
    images = rng().integers(0, 256, (2, 4, 5, 3), np.uint8)
    boxes = [np.zeros((0, 4), np.float32), np.ones((2, 4), np.float32)]
    keys = {"mask": images[..., 0], "boxes": boxes, "text": ["a", "bc"]}
    source = InMemory(images, keys=keys)
    assert source.class_names == () and set(source[1]) == {"image", *keys}
    np.testing.assert_array_equal(source[1]["mask"], images[1, ..., 0])
    assert source[0]["boxes"].shape == (0, 4) and source[1]["text"] == "bc"
    source[1]["boxes"][:] = 7
    assert source[1]["boxes"].max() == 1  # A copy.
    prints = {
        InMemory(images).fingerprint,
        InMemory(images, np.array([0, 1]), ("a", "b")).fingerprint,
        source.fingerprint,
        InMemory(images, keys=keys | {"text": ["ab", "c"]}).fingerprint,
        InMemory(images, keys={"text": ["a", "bc"]}).fingerprint,
    }
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": ("a", "b")}, "2 class names and no labels"),
        ({"keys": {"mask": np.zeros((3, 4, 4), int)}}, "'mask'. has 3 items for 2"),
        ({"keys": {"label": [1, 2]}}, 'another name than "image" and "label"'),
    ],
)
def test_wrong_keys_of_arrays_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InMemory(np.zeros((2, 4, 4), np.uint8), **fields)


# The tool that audits a set.


def check(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_set_without_labels_is_audited(tmp_path, written):
    for number in range(12):
        folder = tmp_path / ("x" if number % 2 else "y/z")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng(number).integers(0, 256, (9, 9, 3)).astype(np.uint8)
        (folder / f"{number}.png").write_bytes(encoded(".png", pixels))
    done = check("--no_labels", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 11 images\n" in done.stdout and "classes" not in done.stdout
    assert "val: 1 images" in done.stdout and "Problems: none" in done.stdout
    (tmp_path / "x" / "bad.png").write_bytes(b"no image")
    assert "unreadable images" in check("--no_labels", str(tmp_path)).stdout
    tfds_set = ("--tfds", "scenes", "--data_dir", str(written[0]), "--no_labels")
    assert "train: 5 images\n" in check(*tfds_set).stdout
