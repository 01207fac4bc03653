"""Words become ids of a vocabulary; images of rare ones repeat, noise takes some."""

import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from tables import table, write_table

from big_vision_lite.data import pipeline, unopened
from big_vision_lite.data.batches import Order
from big_vision_lite.data.sources import (
    Digits,
    Frequency,
    InMemory,
    Resampled,
    Tags,
    tags,
    vocabulary,
)
from big_vision_lite.data.sources.resampled import image_factors
from big_vision_lite.runtime import layout

# 8 photos: "#Puppy" and "dog" mean one tag, "tbt" means none, the last has none.
WORDS = [
    ["dog", "beach", "#Puppy"],
    ["puppy"],
    ["DOG", "tbt"],
    ["dog"],
    ["beach", "sun"],
    ["sun"],
    ["snow"],
    ["tbt"],
]
SYNONYMS = {"puppy": "dog", "dog": "dog", "sun": "sun", "beach": "sea", "snow": "snow"}
# Of the vocabulary below: dog 4, sea 2, sun 2, snow 1.
IDS = [[0, 1], [0], [0], [0], [1, 2], [2], [3], []]


@pytest.fixture
def path(tmp_path):
    found = vocabulary.build(WORDS, SYNONYMS, only_listed=True)
    (tmp_path / "tags.json").write_text(found.text(), encoding="utf-8")
    return str(tmp_path / "tags.json")


def photos(words=WORDS):
    images = np.arange(len(words), dtype=np.uint8)[:, None, None, None]
    return InMemory(images + np.zeros((1, 2, 2, 1), np.uint8), keys={"tags": words})


def tagged(path, words=WORDS, **fields):
    return Tags(source=photos(words), vocabulary=path, max_tags=3, **fields)


def listed(ids):
    return [[tag for tag in row if tag >= 0] for row in np.asarray(ids).tolist()]


def test_a_vocabulary_counts_images_merges_synonyms_and_survives_its_file(path):
    found = vocabulary.read(path)
    assert found.names == ("dog", "sea", "sun", "snow")
    assert found.counts == (4, 2, 2, 1) and found.images == 8
    assert found == vocabulary.build(WORDS, SYNONYMS, only_listed=True)
    assert found.ids(["PUPPY ", "beach", "#dog", "tbt"]) == (0, 1)
    np.testing.assert_allclose(found.marginal(), np.array([4, 2, 2, 1]) / 9)
    free = vocabulary.build(WORDS, {"puppy": "dog"}, min_count=2)
    assert free.names == ("dog", "beach", "sun", "tbt")
    assert "snow" not in free.words and free.words["puppy"] == 0


@pytest.mark.parametrize(
    "text, words",
    [
        ("no json", "is not JSON"),
        ("[]", "is no vocabulary: it needs"),
        ('{"images": 1, "tags": [{"tag": "dog", "images": 1}]}', "is no vocabulary"),
        (
            '{"images": 1, "tags": [{"tag": "dog", "images": 1, "words": ["dog"]}]}',
            r"a vocabulary of 1 tags \(dog\) tells nothing apart",
        ),
        (
            json.dumps(
                {
                    "images": 2,
                    "tags": [
                        {"tag": tag, "images": 1, "words": ["pet"]}
                        for tag in ("dog", "cat")
                    ],
                }
            ),
            '"pet" means two tags, "dog" and "cat"',
        ),
        (
            '{"images": 1, "tags": [{"tag": "dog", "images": 0, "words": ["dog"]}]}',
            '"dog" is of 0 images',
        ),
        (
            json.dumps(
                {
                    "images": 2,
                    "tags": [{"tag": "a", "images": 1, "words": [w]} for w in "xy"],
                }
            ),
            'has the tag "a" twice',
        ),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, text, words):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        vocabulary.read(str(tmp_path / "v.json"))


def test_a_missing_vocabulary_says_how_it_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it: python tools/prepare"):
        vocabulary.read(str(tmp_path / "v.json"))


def test_words_become_ids_padded_and_say_how_many_images_have_none(path):
    source = tagged(path)
    assert [source[i]["label"].dtype for i in range(8)] == [np.int32] * 8
    assert listed([source[i]["label"] for i in range(8)]) == IDS == listed(source.ids)
    assert source.class_names == ("dog", "sea", "sun", "snow")
    np.testing.assert_array_equal(source.class_counts(), [4, 2, 2, 1])
    assert (
        set(source[0]) == {"image", "label"} and source.name(3) == "image 3 of an array"
    )
    (line,) = tags.describe([source])
    assert "4 of" in line and "1 of 8 images have none: they weigh 0" in line
    other = tagged(path, [["sun"], *WORDS[1:]])
    assert other.fingerprint != source.fingerprint == tagged(path).fingerprint


def test_a_table_gives_words_and_an_empty_cell_none(tmp_path):
    place = write_table(tmp_path, count=8)
    place.write_text(place.read_text().replace(",|,", ",,"))
    words = table(place, "tags", kind="tags")
    assert words.class_names == () and words.words[:4] == [
        (),
        ("top",),
        ("left",),
        ("top", "left"),
    ]
    one = table(place, "class", kind="tags")  # one word an image, no separator
    assert set(one.words) == {("dark",)}
    (tmp_path / "v.json").write_text(vocabulary.build(words.words).text())
    source = Tags(source=words, vocabulary=str(tmp_path / "v.json"), max_tags=2)
    assert listed(source.ids[:4]) == [[], [1], [0], [1, 0]]
    assert isinstance(source[1]["image"], bytes)
    shapes = {k: np.shape(v) for k, v in source[1].items()}
    for found in (source, Resampled(source=source)):
        made = unopened.example(found, b"")
        assert {k: np.shape(v) for k, v in made.items()} == shapes


@pytest.mark.parametrize(
    "words, fields, message",
    [
        ([["tbt"], ["me"]], {}, "not one of 2 images has a tag of"),
        ([["dog", "sun", "sea"]], {"max_tags": 2}, "has 3 tags, more than max_tags=2"),
        ([3], {}, "is 3, no list of words"),
        (WORDS, {"key": "hashtags"}, 'has no "hashtags", only'),
    ],
)
def test_words_that_cannot_be_used_are_refused(path, words, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tagged(path, words), **fields).ids  # noqa: B018


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_tags": 0}, "max_tags=0 leaves no room"),
        ({"noise": 1.5}, "noise=1.5 is no share"),
        ({"noise_seed": -1}, "noise_seed=-1 is outside"),
    ],
)
def test_fields_that_mean_nothing_are_refused(path, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tagged(path), **fields)


def test_a_table_of_classes_has_no_words_to_read(tmp_path, path):
    classes = table(write_table(tmp_path), "tags", kind="classes")
    with pytest.raises(ValueError, match='give Table\\(kind="tags"\\)'):
        Tags(source=classes, vocabulary=path)
    with pytest.raises(ValueError, match="stand in the vocabulary of Tags"):
        table(write_table(tmp_path), "tags", kind="tags", classes=("a", "b"))


def test_noise_replaces_its_share_by_the_marginal_and_is_always_the_same(path):
    words = [["dog"] if i % 2 else ["snow"] for i in range(4000)]
    clean, noisy = tagged(path, words), tagged(path, words, noise=0.25)
    np.testing.assert_array_equal(noisy.ids, tagged(path, words, noise=0.25).ids)
    np.testing.assert_array_equal(noisy.ids[17], noisy[17]["label"])
    assert (tagged(path, words, noise=0.25, noise_seed=1).ids != noisy.ids).any()
    marginal = vocabulary.read(path).marginal()
    chance = 0.5 * (marginal[0] + marginal[3])
    share = (clean.ids[:, 0] != noisy.ids[:, 0]).mean()
    # 4 sd of a share of 4,000.
    assert abs(share - 0.25 * (1 - chance)) < 4 * np.sqrt(0.2 * 0.8 / 4000)
    drawn = tagged(path, words, noise=1.0).ids[:, 0]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, marginal, atol=0.03)
    assert noisy.fingerprint != clean.fingerprint


def test_a_tag_that_noise_draws_twice_counts_once(path):
    ids = tagged(path, [["dog", "sun", "sea"]] * 200, noise=0.9).ids
    rows = listed(ids)
    assert all(len(set(row)) == len(row) for row in rows)
    assert {len(row) for row in rows} == {1, 2, 3}


@pytest.mark.parametrize(
    "frequency, threshold, factors",
    [
        # Of 7 images with a tag: dog 4 / 7, sea and sun 2 / 7, snow 1 / 7.
        ("natural", None, [1, 1, 1, 1, 1, 1, 1, 0]),
        ("square_root", None, [2**0.5, 1, 1, 1, 2**0.5, 2**0.5, 2, 0]),
        ("uniform", None, [2, 1, 1, 1, 2, 2, 4, 0]),
        ("uniform", 3 / 7, [1.5, 1, 1, 1, 1.5, 1.5, 3, 0]),
    ],
)
def test_the_factor_of_an_image_is_the_largest_of_its_tags(
    path, frequency, threshold, factors
):
    source = tagged(path)
    found = image_factors(
        source.ids, source.class_counts(), Frequency(frequency), threshold
    )
    np.testing.assert_allclose(found, factors)
    # By hand, tag by tag.
    for row, factor in zip(IDS, found, strict=True):
        ratios = [(threshold or 4 / 7) / ([4, 2, 2, 1][tag] / 7) for tag in row]
        phi = {"natural": lambda x: 1, "square_root": np.sqrt, "uniform": float}
        expected = max([max(1, phi[frequency](r)) for r in ratios], default=0)
        assert factor == pytest.approx(expected)
    for seed in range(5):
        repeated = Resampled(
            source=source,
            frequency=Frequency(frequency),
            threshold=threshold,
            seed=seed,
        )
        times = np.bincount(
            [repeated.place(i) for i in range(len(repeated))], minlength=8
        )
        assert ((times == np.floor(factors)) | (times == np.ceil(factors))).all()
        assert abs(len(repeated) - sum(factors)) < 1


def test_the_coin_gives_the_rest_of_a_factor_its_share(path):
    places = [
        np.bincount([each.place(i) for i in range(len(each))], minlength=8)
        for seed in range(400)
        for each in [Resampled(source=tagged(path), seed=seed)]
    ]
    mean = np.mean(places, axis=0)
    np.testing.assert_allclose(mean[[0, 4, 5]], 2**0.5, atol=4 * 0.5 / 20)
    np.testing.assert_array_equal(mean[[1, 2, 3, 6, 7]], [1, 1, 1, 2, 0])


def test_every_epoch_permutes_one_list(path):
    repeated = Resampled(source=tagged(path), frequency=Frequency.UNIFORM)
    size = len(repeated)
    order = Order(size, seed=3)
    epochs = [
        sorted(
            repeated.place(i) for i in order.indices(range(e * size, e * size + size))
        )
        for e in range(3)
    ]
    assert (
        epochs[0] == epochs[1] == epochs[2] == sorted(map(repeated.place, range(size)))
    )


def mesh():
    devices = jax.devices()[:2]
    return jax.make_mesh(
        (2, 1), layout.BATCH_AXES, (AxisType.Auto,) * 2, devices=devices
    )


def taken(stream, first, count):
    with pipeline.open_batches(stream, 0, mesh()) as batches:
        made = batches.starting_at(first)
        return [{k: np.asarray(x) for k, x in next(made).items()} for _ in range(count)]


def test_resumed_batches_are_those_of_the_straight_run(path):
    source = Resampled(source=tagged(path, noise=0.3))
    stream = pipeline.Stream(source=source, batch_size=4, threads=1)
    straight = taken(stream, 1, 9)
    assert straight[0]["label"].shape == (4, 3)
    assert straight[0]["label"].dtype == np.int32
    again = Resampled(source=tagged(path, noise=0.3))
    stream = pipeline.Stream(source=again, batch_size=4, threads=3)
    for resumed, expected in zip(taken(stream, 6, 4), straight[5:], strict=True):
        for key in expected:
            np.testing.assert_array_equal(resumed[key], expected[key])


@pytest.mark.slow
@pytest.mark.processes
def test_worker_processes_make_the_batches_of_threads(path):
    source = Resampled(source=tagged(path, noise=0.3))
    stream = pipeline.Stream(source=source, batch_size=4, threads=1)
    threads = taken(stream, 3, 4)
    for made, expected in zip(
        taken(dataclasses.replace(stream, processes=2), 3, 4), threads, strict=True
    ):
        for key in expected:
            np.testing.assert_array_equal(made[key], expected[key])


def test_a_copy_opens_nothing_and_a_worker_need_not_read_the_tags_again(path):
    closed = Resampled(source=Tags(source=Digits(), vocabulary="/none"))
    assert pickle.loads(pickle.dumps(closed)) == closed
    opened = Resampled(source=tagged(path))
    size = len(opened)
    copy = pickle.loads(pickle.dumps(opened))
    copy.source.vocabulary = "/none"
    assert len(copy) == size and copy.place(3) == opened.place(3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"source": Digits()}, "repeats images by their tags"),
        ({"threshold": 2.0}, "threshold=2.0 is no share"),
        ({"threshold": 0.1, "frequency": "natural"}, "means nothing with frequency"),
        ({"seed": -1}, "seed=-1 is outside"),
    ],
)
def test_resampling_that_means_nothing_is_refused(path, fields, message):
    fields = {"source": tagged(path), **fields}
    if "frequency" in fields:
        fields["frequency"] = Frequency(fields["frequency"])
    with pytest.raises(ValueError, match=message):
        Resampled(**fields)


def test_a_threshold_that_changes_nothing_is_refused(path):
    with pytest.raises(ValueError, match="below the frequency of every tag"):
        len(Resampled(source=tagged(path), threshold=0.01))


def test_ids_outside_the_vocabulary_are_refused(path):
    @dataclasses.dataclass
    class Broken:
        source: Tags

        def __getattr__(self, name):
            return getattr(self.source, name)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"image": np.zeros((2, 2, 1), np.uint8), "label": np.int32([0, 9])}

        def name(self, index):
            return "photo"

    stream = pipeline.Stream(source=Broken(tagged(path)), batch_size=4, threads=1)
    with pytest.raises(ValueError, match=r"photo: the tags \[0, 9\], but .* 4 classes"):
        taken(stream, 1, 1)
