"""tools/check_dataset.py and tools/prepare_dataset.py on small folders of images."""

import importlib.util
import io
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from prepared import labels_of
from tables import write_table

from big_vision_lite.data.ops.decode import decode
from big_vision_lite.data.sources import ImageFolder, Tfds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


check_dataset = tool("check_dataset")
prepare_dataset = tool("prepare_dataset")


def put(path: Path, seed: int, height: int = 12, width: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.write_bytes(cv2.imencode(path.suffix.lower(), pixels)[1].tobytes())


@pytest.fixture
def pictures(tmp_path):
    """Twelve images of each of two classes, all good."""
    root = tmp_path / "my pictures é"
    for number in range(12):
        suffix = (".jpg", ".PNG", ".webp", ".bmp")[number % 4]
        put(root / "cat" / f"{number}{suffix}", number, height=8 + number)
        put(root / "dög" / "deep er" / f"{number}{suffix}", 100 + number)
    return root


def check(capsys, *arguments) -> tuple[int, str]:
    code = check_dataset.main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out + streams.err


def pack(capsys, root, out, *arguments) -> tuple[int, str]:
    words = ["folder", root, "--out", out, "--name", "pets", "--threads", 2, *arguments]
    code = prepare_dataset.main([str(word) for word in words])
    streams = capsys.readouterr()
    return code, streams.out + streams.err


def test_a_good_folder_passes_with_its_numbers(pictures, capsys):
    code, text = check(capsys, pictures)
    assert code == 0 and "Problems: none." in text
    assert "train: 22 images, 2 classes" in text and "val: 2 images" in text
    assert "  cat: 11\n" in text
    assert "smallest sides 8x9" in text and "largest 19x9" in text
    assert "short side 8 to 15 px: 22" in text


def test_images_that_their_exif_turns_are_counted(pictures, capsys):
    assert "EXIF" not in check(capsys, pictures)[1]
    for number, (suffix, orientation) in enumerate(
        [("jpg", 6), ("png", 3), ("webp", 8), ("jpg", 1), ("png", 77)]
    ):
        image = PIL.Image.new("RGB", (9, 20 + number))
        exif = image.getexif()
        exif[0x112] = orientation
        image.save(pictures / "cat" / f"turned {number}.{suffix}", exif=exif)
    code, text = check(capsys, "--no_labels", pictures)
    counts = [int(n) for n in re.findall(r"EXIF turns (\d+) images", text)]
    assert code == 0 and sum(counts) == 3 and 'orientation="apply"' in text


def test_every_kind_of_bad_image_is_named(pictures, capsys):
    good = (pictures / "cat" / "0.jpg").read_bytes()
    (pictures / "cat" / "short.jpg").write_bytes(good[: len(good) // 2])
    (pictures / "cat" / "empty.png").touch()
    (pictures / "cat" / "text.jpg").write_text("not an image")
    code, text = check(capsys, pictures)
    assert code == 1 and "train: 2 unreadable images (8.333%)" in text
    assert "val: 1 unreadable images (33.333%)" in text
    for name in ("short.jpg", "empty.png: 0 bytes", "text.jpg: not a JPEG"):
        assert f"{pictures / 'cat'}/{name}" in text


def test_the_same_file_in_two_splits_or_under_two_labels_is_found(tmp_path, capsys):
    for split, seeds in (("train", (1, 2, 3)), ("test", (4, 3))):
        for name in ("cat", "dog"):
            for seed in seeds:
                put(
                    tmp_path / split / name / f"{seed}.png", seed + 50 * (name == "dog")
                )
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "train/dog/copy.png")
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "train/cat/again.png")
    code, text = check(capsys, tmp_path)
    assert code == 1 and "Problems: 2." in text
    assert "2 images of test are also in train" in text
    assert f"{tmp_path}/test/cat/3.png = {tmp_path}/train/cat/3.png" in text
    assert "1 images have two labels" in text
    assert f"{tmp_path}/train/dog/copy.png = {tmp_path}/train/cat/1.png" in text
    assert "2 images repeat another one of their split" in text


def test_one_class_and_unknown_classes_are_problems(tmp_path, capsys):
    put(tmp_path / "train" / "cat" / "0.png", 0)
    code, text = check(capsys, tmp_path)
    assert code == 1 and "has one class (cat)" in text
    put(tmp_path / "train" / "dog" / "0.png", 1)
    put(tmp_path / "val" / "emu" / "0.png", 2)
    code, text = check(capsys, tmp_path)
    assert code == 1 and "1 classes unknown to training: emu" in text
    assert "train: 2 images, 2 classes" in text


def test_uneven_classes_are_a_warning(tmp_path, capsys):
    for number in range(30):
        put(tmp_path / "train" / "cat" / f"{number}.png", number)
    put(tmp_path / "train" / "dog" / "0.png", 99)
    put(tmp_path / "val" / "dog" / "0.png", 98)
    code, text = check(capsys, tmp_path)
    assert code == 0
    assert "train is uneven: cat has 30 images, the smallest class 1" in text
    assert "val has no image of 1 classes: cat" in text


def test_a_table_is_audited_like_a_folder(tmp_path, capsys):
    path = write_table(tmp_path)
    (tmp_path / "003.png").write_text("not an image")
    shutil.copy(tmp_path / "001.png", tmp_path / "007.png")  # of train, into val
    words = ("--table", path, "--image", "file", "--split_column", "part")
    code, text = check(capsys, *words, "--label", "class")
    assert code == 1 and "train: 15 images, 2 classes" in text
    assert f"{tmp_path}/003.png: not a JPEG" in text
    assert "1 images of val are also in train" in text
    code, text = check(capsys, *words, "--label", "left,top", "--kind", "flags")
    assert code == 1 and "val: 9 images, 2 classes" in text
    # Numbers have no classes to count; another number of the same image is found.
    code, text = check(capsys, *words, "--label", "grey", "--kind", "numbers")
    assert code == 1 and "train: 15 images\n" in text and "grey 40 to" in text
    assert "1 images have two labels" in text and "has no image of" not in text
    code, text = check(capsys, *words, "--label", "clas")
    assert code == 2 and 'Did you mean "class"' in text


def test_an_empty_folder_is_one_problem_and_cannot_be_opened(tmp_path, capsys):
    code, text = check(capsys, tmp_path)
    assert code == 2 and text.count("PROBLEM") == 1 and "holds no images" in text
    # Class folders without images are no better.
    (tmp_path / "cat").mkdir()
    assert check(capsys, tmp_path)[0] == 2


def test_an_empty_class_folder_is_mentioned(pictures, tmp_path, capsys):
    (pictures / "emu" / "young").mkdir(parents=True)
    code, text = check(capsys, pictures)
    assert code == 0
    assert text.count("1 folders without an image, such as emu\n") == 1
    names = ("train/cat", "train/dog", "val/cat", "val/dog")
    for number, name in enumerate(names):
        put(tmp_path / "split" / name / "0.png", number)
    (tmp_path / "split" / "val" / "emu").mkdir()
    code, text = check(capsys, tmp_path / "split")
    assert "1 folders without an image, such as val/emu" in text


def test_wrong_names_end_with_code_2_and_no_trace(tmp_path, capsys):
    code, text = check(capsys, tmp_path / "none")
    assert code == 2 and "there is no folder" in text
    code, text = check(capsys, "--tfds", "none", "--data_dir", tmp_path)
    assert code == 2 and "none is not prepared" in text


def test_a_packed_folder_reads_the_same_by_tfds_and_by_us(pictures, tmp_path, capsys):
    out = tmp_path / "sets"
    code, text = pack(capsys, pictures, out, "--shard_mb", "0.002")
    assert code == 0 and "train 22, val 2" in text and "2 classes: cat, dög" in text
    folder = out / "pets" / "1.0.0"
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["label"].names == ["cat", "dög"]
    assert builder.info.splits["train"].num_shards > 1
    keep = {"image": tfds.decode.SkipDecoding()}
    for split in ("train", "val"):
        source = ImageFolder(path=str(pictures), split=split)
        originals = {source.relative_path(i): source[i] for i in range(len(source))}
        theirs = builder.as_data_source(split, decoders=keep)
        ours = Tfds(dataset="pets", split=split, data_dir=str(out))
        assert len(ours) == len(theirs) == len(originals)
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            original = originals.pop(other["file_name"].decode())
            assert mine == original
            assert mine == {"image": other["image"], "label": other["label"]}
            assert ours.name(index).endswith(f"({other['file_name'].decode()})")
    assert builder.as_data_source("train")[0]["image"].dtype == np.uint8
    code, text = check(capsys, "--tfds", "pets", "--data_dir", out)
    assert code == 0 and "train: 22 images, 2 classes" in text


def test_split_folders_stay_splits_and_slices_hold_all_classes(tmp_path, capsys):
    for split, number in (("train", 40), ("test", 4)):
        for name in ("a", "b", "c", "d"):
            for seed in range(number):
                put(tmp_path / "in" / split / name / f"{seed}.png", seed, 4, 4)
    code, text = pack(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 0 and "train 160, test 16" in text
    tenth = Tfds(dataset="pets", split="train[:25%]", data_dir=str(tmp_path / "out"))
    assert set(labels_of(tenth)) == {0, 1, 2, 3}


def test_unreadable_images_are_left_out_and_listed(pictures, tmp_path, capsys):
    (pictures / "cat" / "text.jpg").write_text("not an image")
    code, text = pack(capsys, pictures, tmp_path / "sets")
    assert code == 0 and "1 unreadable images left out" in text
    listed = (tmp_path / "sets" / "pets" / "1.0.0" / "skipped.txt").read_text()
    assert listed.startswith("cat/text.jpg: not a JPEG")
    assert len(Tfds(dataset="pets", split="all", data_dir=str(tmp_path / "sets"))) == 24


def test_a_shard_of_unreadable_images_stays_empty(tmp_path, capsys):
    for number in range(40):
        path = tmp_path / "in" / "train" / "ab"[number % 2] / f"{number}.png"
        put(path, number) if number < 4 else path.write_bytes(b"x" * 900)
    code, text = pack(capsys, tmp_path / "in", tmp_path / "out", "--shard_mb", "0.001")
    assert code == 0 and "0 images" in text
    source = Tfds(dataset="pets", data_dir=str(tmp_path / "out"))
    builder = tfds.builder_from_directory(tmp_path / "out" / "pets" / "1.0.0")
    assert len(source) == len(builder.as_data_source("train")) == 4


def test_a_split_without_a_readable_image_is_refused(tmp_path, capsys):
    put(tmp_path / "in" / "train" / "a" / "0.png", 0)
    put(tmp_path / "in" / "train" / "b" / "0.png", 1)
    (tmp_path / "in" / "val" / "a").mkdir(parents=True)
    (tmp_path / "in" / "val" / "a" / "0.png").write_text("text")
    code, text = pack(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1 and "no image of split val can be read: val/a/0.png: not" in text
    assert not (tmp_path / "out" / "pets" / "1.0.0").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import prepare_dataset
write, calls = prepare_dataset.write_shard, []
def killed(*arguments):
    calls.append(write(*arguments))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]
prepare_dataset.write_shard = killed
prepare_dataset.main(sys.argv[2:])
"""


def test_a_killed_packing_goes_on_where_it_was(pictures, tmp_path, capsys):
    words = ["folder", pictures, "--name", "pets", "--shard_mb", "0.002", "--out"]
    words = [str(word) for word in words]
    out = tmp_path / "sets"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(TOOLS), *words, str(out)],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    staging = out / "pets" / "1.0.0.incomplete"
    assert staging.is_dir() and not (out / "pets" / "1.0.0").exists()
    finished = sorted(staging.glob("*-of-?????"))
    assert len(finished) == 2
    with pytest.raises(FileNotFoundError, match="pets is not prepared"):
        len(Tfds(dataset="pets", data_dir=str(out)))
    # The second file is damaged meanwhile: it is not trusted.
    finished[1].write_bytes(finished[1].read_bytes()[:-1])
    stamp = finished[0].stat().st_mtime_ns
    assert prepare_dataset.main([*words, str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{finished[0].name}: kept" in text
    assert f"{finished[1].name}: damaged since it was written" in text
    final = out / "pets" / "1.0.0"
    assert (final / finished[0].name).stat().st_mtime_ns == stamp
    # The same bytes as without the kill, and nothing left beside them.
    assert prepare_dataset.main([*words, str(tmp_path / "straight")]) == 0
    straight = tmp_path / "straight" / "pets" / "1.0.0"
    assert {p.name: p.read_bytes() for p in final.iterdir()} == {
        p.name: p.read_bytes() for p in straight.iterdir()
    }
    assert [path.name for path in (out / "pets").iterdir()] == ["1.0.0"]


def test_a_changed_folder_starts_anew(pictures, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise OSError("stopped")

    monkeypatch.setattr(prepare_dataset, "write_metadata", stop)
    assert pack(capsys, pictures, tmp_path)[0] == 1
    monkeypatch.undo()
    put(pictures / "cat" / "new.png", 7)
    code, text = pack(capsys, pictures, tmp_path)
    assert code == 0 and "have changed since the last call" in text
    assert "kept" not in text and "train 23" in text


def test_a_full_disk_is_an_error_and_the_next_call_goes_on(pictures, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        code, text = pack(capsys, pictures, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "cannot write" in text and "is the disk full?" in text
    assert not (tmp_path / "pets" / "1.0.0").exists()
    assert pack(capsys, pictures, tmp_path)[0] == 0


def test_two_packings_at_once_are_refused(pictures, tmp_path, capsys, monkeypatch):
    codes = []

    def second(*_):
        codes.append(pack(capsys, pictures, tmp_path))
        raise OSError("stopped")

    monkeypatch.setattr(prepare_dataset, "write_metadata", second)
    assert pack(capsys, pictures, tmp_path)[0] == 1
    assert codes[0][0] == 1 and "another process is preparing" in codes[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "My-Set"), "use small letters, digits and _"),
        (("--version", "1"), "use three numbers"),
    ],
)
def test_wrong_names_of_a_set_are_refused(
    pictures, tmp_path, capsys, arguments, message
):
    code, text = pack(capsys, pictures, tmp_path, *arguments)
    assert code == 1 and message in text


def test_a_set_that_exists_is_never_touched(pictures, tmp_path, capsys):
    (tmp_path / "pets" / "1.0.0").mkdir(parents=True)
    code, text = pack(capsys, pictures, tmp_path)
    assert code == 1 and "is already prepared" in text


def test_class_names_that_a_list_cannot_hold_are_refused(tmp_path, capsys):
    put(tmp_path / "in" / "cat " / "0.png", 0)
    put(tmp_path / "in" / "cat" / "0.png", 1)
    code, text = pack(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1 and "begin or end with a space" in text


def test_preparing_a_tfds_set_says_what_is_missing(tmp_path, capsys, monkeypatch):
    def prepare(dataset):
        words = ["tfds", dataset, "--data_dir", str(tmp_path)]
        return prepare_dataset.main(words), capsys.readouterr().err

    code, text = prepare("imagenet2012")
    assert code == 1 and f"{tmp_path}/downloads/manual/ILSVRC2012_img_train.tar" in text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, text = prepare("cifar10")
    assert code == 1 and 'pip install -e ".[prepare]"' in text


class BvlTinyBugs(tfds.core.GeneratorBasedBuilder):
    """A set that TFDS knows by name and that needs no network."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["ant", "bee"])
        features = {"image": tfds.features.Image(), "label": label}
        whole = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=whole)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(6):
            image = np.full((4, 5, 3), number, np.uint8)
            encoded = cv2.imencode(".png", image)[1].tobytes()
            yield number, {"image": io.BytesIO(encoded), "label": number % 2}


def test_a_set_that_tfds_knows_is_prepared_and_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    words = ["tfds", "bvl_tiny_bugs", "--data_dir", str(tmp_path)]
    assert prepare_dataset.main(words) == 0
    assert "{'train': 6}" in capsys.readouterr().out
    source = Tfds(dataset="bvl_tiny_bugs", data_dir=str(tmp_path))
    assert source.class_names == ("ant", "bee")
    pixels = [decode(example["image"])[0, 0, 0] for example in source]
    assert [number % 2 for number in pixels] == labels_of(source).tolist()
    assert sorted(pixels) == list(range(6))
    words[1] = "bvl_tiny_bug"
    assert prepare_dataset.main(words) == 1
    assert "TFDS knows no set 'bvl_tiny_bug'" in capsys.readouterr().err


def test_the_tools_run_as_scripts(pictures, tmp_path):
    command = [sys.executable, str(TOOLS / "check_dataset.py"), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Problems: none." in done.stdout
    command = [
        sys.executable,
        str(TOOLS / "prepare_dataset.py"),
        "folder",
        str(tmp_path),
    ]
    command += ["--out", str(tmp_path / "o"), "--name", "x", "--version", "a"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
