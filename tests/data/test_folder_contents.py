"""What lies in a folder beside the images of classes: read, said, or asked."""

import os
import socket
from pathlib import Path

import pytest

from big_vision_lite.data.sources import ImageFolder, file_kinds, folder_splits
from big_vision_lite.data.sources.contents import merged
from big_vision_lite.data.sources.folder import describe, open_folder

CLASSES = ("cat", "dog", "frog")


def put(path: Path, data: bytes = b"image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make(root: Path, *folders: str, count: int = 2) -> Path:
    for folder in folders:
        for number in range(count):
            put(root / folder / f"{number}.jpg")
    return root


def classes_in(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in CLASSES]


def paragraph(root: Path) -> str:
    return "\n".join(describe(list(open_folder(str(root)).values())))


def beside(root: Path) -> str:
    source = ImageFolder(path=str(root), split="all")
    return str(merged(source.left_out.values()))


SPLIT_NAMES = {
    "Training Testing": "train test",
    "training_set test_set": "train test",
    "seg_train seg_test": "train test",
    "train dev": "train val",
    "TrainImages ValidationImages TestImages": "train val test",
    "train2017 val2017": "train val",
    "dogs-train dogs-valid": "train val",
    "trainset testset": "train test",
    "Train Data/Test Data": "train test",
    "trainval test": "train test",
    "train holdout": "train val",
}


@pytest.mark.parametrize("names", SPLIT_NAMES)
def test_names_that_mean_a_split_are_splits(tmp_path, names):
    folders = names.split("/" if "/" in names else " ")
    make(tmp_path, *classes_in(*folders))
    splits = open_folder(str(tmp_path))
    assert list(splits) == SPLIT_NAMES[names].split()
    for source in splits.values():
        assert source.class_names == CLASSES and len(source) == 6
        assert source.relative_path(0).split(os.sep)[0] in folders
    said = paragraph(tmp_path)
    for folder in folders:
        assert f"(folder {folder})" in said or folder in ("train", "val", "test")


def test_folders_for_predictions_are_left_out_and_said(tmp_path):
    make(tmp_path, *classes_in("seg_train", "seg_test", "seg_pred"))
    assert "1 folders that are no split, such as seg_pred" in paragraph(tmp_path)
    assert len(open_folder(str(tmp_path))["train"]) == 6


def test_a_folder_that_repeats_its_name_is_one(tmp_path):
    make(tmp_path, *classes_in("seg_train/seg_train", "seg_test/seg_test"))
    splits = open_folder(str(tmp_path))
    assert splits["test"].class_names == CLASSES
    assert "(folder seg_test/seg_test)" in paragraph(tmp_path)


# Names that may be both: (folders, what the message says).
UNCERTAIN = {
    "a split beside classes": (["cat", "dog", "test"], "other folders of images"),
    "training, a sport": (["running", "training"], "other folders of images"),
    "images without classes": (["Training", "Testing"], "lie directly in Testing, Tr"),
    "two for one split": (classes_in("train", "val", "dev"), "two folders for one"),
    "a split beside others": (classes_in("train", "extra"), "other folders of images"),
    "folds": (classes_in("fold1", "fold2"), "like parts of one set (fold1, fold2)"),
    "parts": (classes_in("part_1", "part_2", "part_3"), "like parts of one set"),
    "splits in classes": (
        [f"{name}/{split}" for name in CLASSES for split in ("train", "test")],
        "hold folders named like splits (test, train)",
    ),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_names_that_may_be_splits_or_classes_are_asked(tmp_path, case):
    folders, said = UNCERTAIN[case]
    make(tmp_path, *folders)
    with pytest.raises(ValueError) as refused:
        open_folder(str(tmp_path))
    message = str(refused.value)
    assert said in message and "two ways" in message
    assert "\n  As splits: " in message and "\n  As classes (" in message
    # What it says to type for the second reading works.
    typed = message.split("configs/folder.py:dir=")[1].split(" (in Python")[0]
    path, _, classes = typed.partition(",classes=")
    top = tuple(sorted({folder.split("/")[0] for folder in folders}))
    assert path == str(tmp_path) and tuple(classes.split(",")) == top
    assert open_folder(path, classes=classes)["train"].class_names == top


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("bullet train", "steam_train"),
        ("test_tube", "beaker"),
        ("devil", "valley", "trainer", "attest"),
        ("pretest", "posttest"),
    ],
)
def test_words_that_only_look_like_splits_are_classes(tmp_path, names):
    make(tmp_path, *names)
    assert ImageFolder(path=str(tmp_path)).class_names == tuple(sorted(names))


def test_splits_a_folder_deeper_are_named(tmp_path):
    make(tmp_path, *classes_in("archive/Training", "archive/Testing"))
    with pytest.raises(ValueError, match=f"one folder deeper.*: {tmp_path}/archive"):
        open_folder(str(tmp_path))
    make(tmp_path / "other", "images/cat", "images/dog")
    with pytest.raises(ValueError, match=r"one class \(images\).* cat, dog: .*/images"):
        open_folder(str(tmp_path / "other"))


SYSTEM_FOLDERS = (
    *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("__MACOSX", ".ipynb_checkpoints", ".Trash-1000", "FOUND.000", ".@__thumb"),
    *("__pycache__", ".git", ".AppleDouble", "LOST.DIR"),
)
SYSTEM_FILES = ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.jpg", "a.jpg~", "b.part")


def test_what_systems_make_is_no_class_and_is_counted(tmp_path):
    make(tmp_path, *CLASSES, count=10)
    for name in SYSTEM_FOLDERS:
        put(tmp_path / name / "thumb.jpg")
        put(tmp_path / "cat" / name / "thumb.jpg")
    for name in SYSTEM_FILES:
        put(tmp_path / "dog" / name)
    splits = open_folder(str(tmp_path))
    assert splits["train"].class_names == CLASSES
    assert sum(map(len, splits.values())) == 30
    count = 2 * len(SYSTEM_FOLDERS) + len(SYSTEM_FILES)
    assert f"{count} files and folders of systems and editors" in paragraph(tmp_path)


def test_waste_is_sorted_into_trash_and_recycle(tmp_path):
    make(tmp_path, "trash", "recycle", "cache", "git")
    assert len(ImageFolder(path=str(tmp_path)).class_names) == 4


def test_splits_hold_what_systems_make_too(tmp_path):
    make(tmp_path, *classes_in("Training", "Testing"), "@eaDir/Training")
    put(tmp_path / "Testing" / "@eaDir" / "cat" / "thumb.jpg")
    said = paragraph(tmp_path)
    assert "test       6 images of 3 classes" in said
    assert "2 files and folders of systems and editors, such as @eaDir" in said


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".gif", ".Tif", ".tiff", ".avif"])
def test_classes_of_other_suffixes_are_read(tmp_path, suffix):
    if suffix.lower() not in file_kinds.SUFFIXES:
        pytest.skip(f"Pillow was built without {suffix}")
    make(tmp_path, "cat", "dog")
    for number in range(2):
        put(tmp_path / "frog" / f"{number}{suffix}")
    assert ImageFolder(path=str(tmp_path)).class_names == CLASSES


# By their first bytes: (suffix, bytes, what is said).
OTHER_PICTURES = {
    "HEIC": (
        ".heic",
        b"\0\0\0\x18ftypheic",
        "HEIC, which is not read; convert",
    ),
    "HEIF": (".HEIF", b"\0\0\0\x18ftypmif1", "HEIC, which is not read"),
    "Nikon": (".nef", b"MM\0*\0\0\0\x08", "camera raw, which is not read; develop"),
    "Canon": (".cr3", b"\0\0\0\x18ftypcrx ", "camera raw"),
    "SVG": (".svg", b'<?xml version="1.0"?>\n<svg width="3">', "SVG, which is not"),
    "Photoshop": (".psd", b"8BPS\0\1", "Photoshop, which is not read; flatten"),
    "JPEG XL": (
        ".jxl",
        b"\xff\x0a\0",
        "JPEG XL, which is not read; convert them: d",
    ),
    "DICOM": (".dcm", bytes(128) + b"DICM", "DICOM, which is not read; convert"),
    "video": (".mp4", b"\0\0\0\x18ftypisom", "video, which is not read; take out pict"),
    "archive": (".zip", b"PK\x03\x04", "archive, which is not read; unpack"),
    "other name": (".dat", b"\xff\xd8\xff\xe0", "JPEG by its first bytes; rename them"),
    "no name": ("", b"\x89PNG\r\n\x1a\n", "PNG by its first bytes; rename them to end"),
    "text": (".txt", b"hello", ""),
    "nothing": (".raw", b"", "empty"),
}


@pytest.mark.parametrize("case", OTHER_PICTURES)
def test_other_pictures_are_named_by_their_first_bytes(tmp_path, case):
    suffix, data, said = OTHER_PICTURES[case]
    make(tmp_path, "cat", "dog")
    put(tmp_path / "frog" / f"b{suffix}", data)
    put(tmp_path / "frog" / f"a{suffix}", data)
    lines = paragraph(tmp_path).splitlines()
    kind = f"{suffix.lower()} files" if suffix else "files without a suffix"
    (line,) = (line for line in lines if kind in line)
    assert line.startswith(f"  left out   2 {kind}, such as frog/a{suffix}")
    assert (
        line.removesuffix(".").endswith(f"frog/a{suffix}") if not said else said in line
    )
    # A class that is lost by that is said, too.
    assert any("1 folders without an image, such as frog" in line for line in lines)


def test_the_paragraph_names_splits_classes_and_what_is_left_out(tmp_path):
    make(tmp_path, "train/cat", "Validation/dog", count=3)
    make(tmp_path, "train/dog", "Validation/cat", "test/cat")
    put(tmp_path / "train" / "loose.jpg")
    put(tmp_path / "cover.png")
    put(tmp_path / "train" / "cat" / "notes\nof two lines.txt")
    splits = open_folder(str(tmp_path))
    del splits["test"]
    assert describe(list(splits.values())) == [
        f"images       {tmp_path}",
        "  train      5 images of 2 classes: smallest dog (2), largest cat (3)",
        "  val        5 images of 2 classes: smallest cat (2), largest dog (3) "
        "(folder Validation)",
        "  not used   test (folder test)",
        "  left out   1 .txt files, such as train/cat/notes of two lines.txt",
        "  left out   1 images outside a class folder, such as train/loose.jpg",
        "  left out   1 images outside a split folder, such as cover.png",
    ]


def test_a_flat_folder_is_said_once_for_both_splits(tmp_path):
    make(tmp_path, *CLASSES, count=20)
    put(tmp_path / "notes.txt")
    said = paragraph(tmp_path)
    assert said.count("notes.txt") == said.count("1 .txt files") == 1
    assert "train      54 images of 3 classes" in said
    assert "val        6 images" in said and "(by a hash, split_seed=0)" in said


@pytest.mark.parametrize("split", ["val", "test", "Validation"])
def test_images_in_the_split_folder_itself_are_said(tmp_path, split):
    make(tmp_path, *classes_in("train"), split, count=5)
    source = open_folder(str(tmp_path))["test" if split == "test" else "val"]
    with pytest.raises(FileNotFoundError) as refused:
        len(source)
    message = str(refused.value)
    assert f"its 5 images lie in {tmp_path}/{split} itself" in message
    assert f"{tmp_path}/{split}/CLASS/image.jpg" in message


def test_paths_that_are_no_files_are_left_out_and_said(tmp_path):
    make(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cat" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "dog" / "null.jpg").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "dog" / "socket.jpg"))
    assert beside(tmp_path) == (
        "1 devices, 1 links that lead to themselves, 1 links to nothing, 1 named "
        "pipes, 1 sockets"
    )


@pytest.mark.parametrize("closed", ["cat", "cat/deeper", "val", "val/cat", ""])
def test_a_folder_that_cannot_be_opened_ends_a_listing(tmp_path, monkeypatch, closed):
    make(tmp_path, "train/cat", "train/dog", "val/cat/deeper")
    root = tmp_path if closed.startswith("val") or not closed else tmp_path / "train"
    if closed == "cat/deeper":
        make(root, closed)
    scan = os.scandir

    def refuse(path):  # as for anyone but root
        if os.fspath(path) == os.path.join(root, closed).rstrip("/"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="cannot be opened: Permission.*chmod"):
        sum(map(len, folder_splits(str(root)).values()))
