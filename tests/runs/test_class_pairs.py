"""Classes are paired by name; in order where that is typed, or they are numbers."""

import dataclasses

import numpy as np
import pytest

from big_vision_lite.config import Init, MatchClasses
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.data.sources.contents import in_order
from big_vision_lite.runs import heads
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.types import Family

OPTION = "--config.evaluators.val.match_classes"
ORDERED = MatchClasses.IN_ORDER
NUMBERS = tuple(map(str, range(12)))


def table(theirs, ours, **more):
    names = {"name": "val", "ours_is": "the model", "option": OPTION}
    return class_table(theirs, ours, **names, **more)


def test_names_in_another_order_are_paired_by_name():
    found = table(("b", "a"), ("a", "b"))
    assert found.indices.tolist() == [1, 0] and found.message is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("cat", "dog"), ()),
        ((), ("cat", "dog")),
        # Numbers that are no labels: 1 may be the first or the second.
        (NUMBERS[1:], ()),
        # Sorted as text, as no lister does any more.
        (tuple(sorted(NUMBERS)), ()),
        (("00", "01", "02"), ("cat", "dog", "fox")),
    ],
)
def test_classes_are_paired_in_order_only_where_that_is_typed(theirs, ours):
    with pytest.raises(ValueError, match=f"{OPTION}=in_order"):
        table(theirs, ours)
    found = table(theirs, ours, match=ORDERED)
    assert found.is_identity and len(found.indices) == len(theirs or ours)
    assert "classes: " in found.message and "paired in order" in found.message


@pytest.mark.parametrize("names", [NUMBERS, tuple(f"{k:02d}" for k in range(12))])
def test_names_that_are_the_labels_are_paired_with_none_and_it_is_said(names):
    for theirs, ours in ((names, ()), ((), names)):
        found = table(theirs, ours)
        assert found.is_identity and len(found.indices) == 12
        assert "no class names, paired in order" in found.message


def test_other_counts_are_refused_whatever_is_typed():
    with pytest.raises(ValueError, match=f"in order they do not match; use {OPTION}"):
        table(("a", "b"), ("c", "d", "e"), match=ORDERED)


HEAD = {"head/kernel": np.zeros((4, 2)), "head/bias": np.zeros(2)}


@dataclasses.dataclass
class Model(Family):
    """A model with a head."""


def same(theirs, ours, said=(), **fields):
    init = Init(path="RUN", **fields)
    kept = heads.kept(HEAD, HEAD, init, Model())
    lines = []
    found = heads.same_classes(theirs, ours, init, kept, lines.append)
    assert all(word in " ".join(lines) for word in said)
    return found


def test_a_head_is_kept_for_other_names_only_where_that_is_typed():
    ours = ("cat", "dog")
    assert same(ours, ours) and same(None, ours)
    for theirs in (("n01", "n02"), (), ("dog", "cat")):
        assert not same(theirs, ours)
        with pytest.raises(ValueError, match="in_order|another order"):
            same(theirs, ours, drop="")
        for drop in ("", None):
            words = ("paired in order", "cat")
            assert same(theirs, ours, words, drop=drop, match_classes=ORDERED)
        # Nothing is paired where the head goes.
        assert not same(theirs, ours, drop="head/.*")
        assert not same(theirs, ours, drop="head/.*", match_classes=ORDERED)
    # Without classes in the data there is nothing to pair.
    assert not same(ours, (), drop="")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (NUMBERS, NUMBERS),
        (("10", "9", "-1", "+2", "0.5"), ("-1", "0.5", "+2", "9", "10")),
        (("1", "01", "2", "10"), ("01", "1", "2", "10")),
        # Beyond what a float tells apart.
        (("9007199254740993", "9007199254740992"), None),
        # One that is no number, and all are text.
        (("10", "9", "cat"), ("10", "9", "cat")),
        (("1e3", "9"), ("1e3", "9")),
        ((), ()),
    ],
)
def test_names_are_sorted_as_numbers_where_all_are(names, expected):
    expected = names[::-1] if expected is None else expected
    assert in_order(names) == in_order(names[::-1]) == list(expected)


@pytest.mark.parametrize("split", ["", "train"])
def test_folders_named_by_numbers_have_them_as_labels(split, tmp_path):
    for name in NUMBERS:
        (tmp_path / split / name).mkdir(parents=True)
        for index in range(2):
            (tmp_path / split / name / f"{index}.png").write_bytes(name.encode())
    source = ImageFolder(path=str(tmp_path))
    assert source.class_names == NUMBERS
    for index in range(len(source)):
        example = source[index]
        assert example["label"] == int(example["image"])
    pinned = ImageFolder(path=str(tmp_path), classes=tuple(sorted(NUMBERS)))
    assert pinned.class_names == tuple(sorted(NUMBERS))
    assert all(
        pinned.class_names[pinned[i]["label"]] == pinned[i]["image"].decode()
        for i in range(len(pinned))
    )
