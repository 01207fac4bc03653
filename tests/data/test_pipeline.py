"""The batch of step n is a function of seed and n, whoever makes it."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time

import cv2
import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType
from sklearn.datasets import load_digits

from big_vision_lite.data import pipeline, workers
from big_vision_lite.data.batches import (
    EvaluationBatches,
    ExampleGenerator,
    Order,
    TrainingBatches,
    replacement,
)
from big_vision_lite.data.host_batch import HostBatch, Report
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    FlipLeftRight,
)
from big_vision_lite.data.unreadable import Unreadable, UnreadableImages
from big_vision_lite.runtime import cpu, layout, sharding

# Jax keeps threads of its own; ours are named.
OURS = "data"


@dataclasses.dataclass(kw_only=True)
class Pngs:
    """The first digits as PNG files in memory; some broken on purpose."""

    size: int = 60
    broken: tuple[int, ...] = ()
    no_file: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()
    wrong_label: tuple[int, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @property
    def fingerprint(self) -> str:
        return "pngs"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        if index in self.no_file:
            raise FileNotFoundError("No such file: /digits/gone.png")
        digits = load_digits_once()
        pixels = (digits.images[index] * 15).astype(np.uint8)
        if index in self.wide:
            pixels = np.repeat(pixels, 2, axis=1)
        data = cv2.imencode(".png", pixels)[1].tobytes()
        label = 10 if index in self.wrong_label else int(digits.target[index])
        return {
            "image": b"no image" if index in self.broken else data,
            "label": label,
            "number": np.int64(index),
        }

    def name(self, index: int) -> str:
        return f"/digits/{index}.png"


def load_digits_once(cache=[]):  # noqa: B006
    if not cache:
        cache.append(load_digits())
    return cache[0]


@dataclasses.dataclass(kw_only=True)
class Noise:
    """Adds noise, so that a batch shows which generator an example got."""

    def __call__(self, example, rng):
        noise = rng.integers(0, 16, example["image"].shape, np.uint8)
        return example | {"image": example["image"] ^ noise, "draw": rng.random()}


GRAY = (Decode(channels=1),)
NOISY = (Decode(channels=1), FlipLeftRight(), Noise())


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[:8])
    return jax.sharding.Mesh(
        devices.reshape(-1, 2), layout.BATCH_AXES, axis_types=(AxisType.Auto,) * 2
    )


def data(source=None, ops=NOISY, batch_size=16, **fields) -> pipeline.Stream:
    return pipeline.Stream(
        source=source or Pngs(), ops=ops, batch_size=batch_size, **fields
    )


def batches_of(config, mesh, *, first=1, count=5, seed=0, **options):
    """Returns `count` batches as numpy."""
    with pipeline.open_batches(config, seed, mesh, **options) as batches:
        some = itertools.islice(batches.starting_at(first), count)
        return [jax.tree.map(np.asarray, dict(batch)) for batch in some]


def assert_equal_batches(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(OURS)]


@pytest.mark.parametrize(
    ("seed", "first"),
    [
        (
            0,
            [
                297,
                371,
                706,
                141,
                935,
                215,
                144,
                766,
                695,
                836,
                71,
                596,
                23,
                854,
                343,
                203,
            ],
        ),
        (
            1,
            [
                344,
                776,
                991,
                552,
                888,
                380,
                333,
                212,
                131,
                614,
                324,
                714,
                456,
                60,
                315,
                271,
            ],
        ),
    ],
)
def test_the_order_never_changes(seed, first):
    # A new permutation would break the resumption of every run: a new major version.
    order = Order(1000, seed)
    assert order.indices(range(16)) == first


def test_each_epoch_is_another_permutation():
    order = Order(37, seed=5)
    epochs = [order.indices(range(37 * e, 37 * e + 37)) for e in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeks_to_step_ten_million_at_once(mesh):
    start = time.perf_counter()
    (batch,) = batches_of(data(), mesh, first=10_000_000, count=1)
    assert batch["image"].shape == (16, 8, 8, 1)
    assert time.perf_counter() - start < 2


def test_examples_of_a_batch_are_its_positions_of_the_order(mesh):
    order = Order(60, seed=3)
    # 10 batches of 16 straddle the epochs of 60.
    for n, batch in enumerate(batches_of(data(), mesh, count=10, seed=3), start=1):
        positions = range((n - 1) * 16, n * 16)
        expected = order.indices(positions)
        assert batch["number"].tolist() == expected
        labels = load_digits_once().target[expected]
        np.testing.assert_array_equal(batch["label"], labels)


def test_batches_hold_every_numeric_key_in_device_dtypes(mesh):
    (batch,) = batches_of(data(), mesh, count=1)
    assert {key: (v.shape, v.dtype) for key, v in batch.items()} == {
        "image": ((16, 8, 8, 1), np.uint8),
        "label": ((16,), np.int32),
        "number": ((16,), np.int32),
        "draw": ((16,), np.float32),
    }


def test_spec_is_what_comes(mesh):
    with pipeline.open_batches(data(), 0, mesh) as batches:
        spec, batch = batches.spec(), next(batches.starting_at(1))
    assert spec.keys() == batch.keys()
    for key, array in batch.items():
        assert (spec[key].shape, spec[key].dtype) == (array.shape, array.dtype)
        assert spec[key].sharding == array.sharding == layout.batch_sharding(mesh)


def test_starting_at_equals_skipping(mesh):
    straight = batches_of(data(), mesh, count=7)
    assert_equal_batches(batches_of(data(), mesh, first=4, count=4), straight[3:])


def test_any_number_of_threads_makes_the_same_batches(mesh):
    one = batches_of(data(threads=1), mesh)
    assert_equal_batches(batches_of(data(threads=4), mesh), one)
    assert_equal_batches(batches_of(data(threads=40), mesh), one)


def test_worker_processes_equal_threads_pass_errors_on_and_end(mesh):
    order = Order(1200, seed=0).indices(range(1200))
    # Steps 30 to 49 are fine but for one image; one of step 50 has a wrong label.
    source = Pngs(size=1200, broken=(order[500],), wrong_label=(order[790],))
    config = data(source, threads=2)
    several = dataclasses.replace(config, processes=2)
    with pipeline.open_batches(several, 0, mesh) as batches:
        iterator = batches.starting_at(30)
        some = list(itertools.islice(iterator, 20))
        assert batches.unreadable.count == 1
        assert batches.stages()["Decode"][1] > 0
        assert batches.threads == 4
        with pytest.raises(ValueError, match=r"/digits/\d+\.png: label 10, but"):
            next(iterator)
    assert_equal_batches(
        [jax.tree.map(np.asarray, dict(batch)) for batch in some],
        batches_of(config, mesh, first=30, count=20),
    )
    assert not multiprocessing.active_children()
    assert not our_threads()


KILLED_RUN = """
import multiprocessing, time
from big_vision_lite.runtime import sharding
from big_vision_lite.data import ops, pipeline, sources

if __name__ == "__main__":
    stream = pipeline.Stream(
        source=sources.Digits(split="train"),
        ops=(ops.Decode(channels=1),),
        batch_size=64,
        processes=1,
    )
    mesh = sharding.make_mesh(sharding.Mesh())
    with pipeline.open_batches(stream, 0, mesh) as batches:
        next(batches.starting_at(1))
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_leaves_no_worker_process(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUN)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True
    ) as run:
        worker = int(run.stdout.readline())
        assert os.path.exists(f"/proc/{worker}")
        run.kill()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_a_full_shared_memory_is_refused_before_the_kernel_does(monkeypatch):
    monkeypatch.setattr(
        workers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2_000_000})
    )
    image = np.zeros((4, 1000, 1000), np.uint8)
    with pytest.raises(OSError, match="2 MB free; one batch needs 4 MB.*processes=0"):
        workers._as_element({"image": image}, Report())


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_of_all_hosts_are_the_rows_of_one(mesh, hosts):
    batch_size, step = 24, 5
    whole = HostBatch(step, range(batch_size))
    maker = TrainingBatches(Pngs(), NOISY, 7, batch_size)
    maker.fill(whole, whole.rows)
    sharding = layout.batch_sharding(mesh)
    parts = []
    for devices in np.split(mesh.devices.ravel(), hosts):
        rows = pipeline.rows_of_devices(sharding, batch_size, set(devices))
        assert len(rows) == batch_size // hosts
        parts.append(HostBatch(step, rows))
        maker.fill(parts[-1], rows)
    for key, array in whole.arrays.items():
        joined = np.concatenate([part.arrays[key] for part in parts])
        np.testing.assert_array_equal(joined, array)


def test_a_host_whose_devices_are_no_neighbours_makes_just_their_rows(mesh):
    batch_size, step = 24, 5
    first, *_, last = mesh.devices.ravel()
    sharding = layout.batch_sharding(mesh)
    rows = pipeline.rows_of_devices(sharding, batch_size, {first, last})
    assert rows == [0, 1, 2, 21, 22, 23]
    maker = TrainingBatches(Pngs(), NOISY, 7, batch_size)
    whole = HostBatch(step, range(batch_size))
    maker.fill(whole, whole.rows)
    found = []
    made = workers.ThreadWorkers(maker, rows, 4, lambda arrays, _: found.append(arrays))
    made.submit(step).result()
    made.close()
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(found[0][key], array[rows])


def test_devices_along_tensor_hold_the_same_rows():
    mesh = sharding.make_mesh(sharding.Mesh(fsdp=2, tensor=2))
    rows = layout.batch_sharding(mesh)
    for pair in mesh.devices.reshape(-1, 2):
        held = [pipeline.rows_of_devices(rows, 16, {device}) for device in pair]
        assert held[0] == held[1] and len(held[0]) == 4
    (batch,) = itertools.islice(pipeline.eval_batches(Pngs(), GRAY, 16, mesh), 1)
    one = sharding.make_mesh(sharding.Mesh(), jax.devices()[:1])
    (same,) = itertools.islice(pipeline.eval_batches(Pngs(), GRAY, 16, one), 1)
    for key, array in same.items():
        np.testing.assert_array_equal(batch[key], array)
        assert batch[key].sharding == rows


@pytest.mark.parametrize("size", [37, 32, 3])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_evaluation_counts_every_example_once_in_order(mesh, size, batch_size):
    examples = pipeline.eval_batches(Pngs(size=size), NOISY, batch_size, mesh, 3)
    for _ in range(2):  # It can be iterated again.
        numbers, labels = [], []
        for batch in examples:
            assert batch["image"].shape == (batch_size, 8, 8, 1)
            valid = np.asarray(batch["valid"])
            assert valid.dtype == bool
            numbers += np.asarray(batch["number"])[valid].tolist()
            labels += np.asarray(batch["label"])[valid].tolist()
            assert not np.asarray(batch["image"])[~valid].any()
        assert numbers == list(range(size))
        assert labels == load_digits_once().target[:size].tolist()
    assert len(examples) == -(-size // batch_size)
    assert not our_threads()


def test_hosts_without_examples_hold_zeros_of_the_right_shape():
    maker = EvaluationBatches(Pngs(size=3), GRAY, 8, attempts=100)
    counted = 0
    for host in range(4):
        batch = HostBatch(0, range(2 * host, 2 * host + 2))
        maker.fill(batch, batch.rows)
        maker.complete(batch)
        assert batch.arrays["image"].shape == (2, 8, 8, 1)
        counted += int(batch.arrays["valid"].sum())
    assert counted == 3


def test_unreadable_images_are_not_valid_in_evaluation(mesh):
    source = Pngs(size=20, broken=(0, 7))
    examples = pipeline.eval_batches(source, GRAY, 8, mesh)
    valid = np.concatenate([np.asarray(batch["valid"]) for batch in examples])
    assert np.flatnonzero(~valid[:20]).tolist() == [0, 7]
    assert examples.unreadable == ("/digits/0.png", "/digits/7.png")


def test_an_unreadable_image_gives_way_to_the_same_one_on_any_host(mesh, tmp_path):
    source = Pngs(size=1200, broken=(11,))
    path = epath.Path(tmp_path) / "bad_files.txt"
    position = Order(1200, seed=0).indices(range(1200)).index(11)
    expected = replacement(0, position, 1, 1200)
    with pipeline.open_batches(data(source), 0, mesh, path) as batches:
        for batch in itertools.islice(batches.starting_at(1), 80):
            numbers = np.asarray(batch["number"])
            assert 11 not in numbers
            if position in range(16):
                assert numbers[position] == expected
            position -= 16
        assert batches.unreadable.message() == (
            f"Skipped 1 unreadable image (0.083 %), list in {path}."
        )
    assert path.read_text() == (
        "11\t/digits/11.png\tnot a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF: "
        "the first bytes are b'no image'\n"
    )


def test_more_than_a_thousandth_unreadable_stops_the_run(mesh, tmp_path):
    source = Pngs(size=1200, broken=(11, 500))
    path = epath.Path(tmp_path) / "bad_files.txt"
    with pytest.raises(ValueError) as stopped:
        batches_of(data(source), mesh, count=80, bad_images_path=path)
    message = str(stopped.value)
    assert "2 of 1200 images do not decode (0.167%)" in message
    assert "/digits/11.png: not a JPEG" in message and "/digits/500.png" in message
    assert "tools/check_dataset.py" in message and str(path) in message
    assert not our_threads()


def test_unreadable_images_are_counted_over_restarts_and_hosts(tmp_path):
    path = epath.Path(tmp_path) / "bad_files.txt"
    first = UnreadableImages(3000, path, process=0)
    second = UnreadableImages(3000, path, process=1)
    first.add([Unreadable(1, "a b\tc", "cut\nshort")])
    first.add([Unreadable(1, "a b\tc", "cut\nshort")])
    assert (first.count, second.count) == (1, 0)
    second.add([Unreadable(2, "name\udcff", "empty")])
    assert second.count == 2
    assert (tmp_path / "bad_files.txt").read_text() == "1\ta b c\tcut short\n"
    assert (tmp_path / "bad_files_1.txt").exists()
    restarted = UnreadableImages(3000, path, process=0)
    assert restarted.count == 2
    restarted.add([Unreadable(3, "c", "empty")])
    with pytest.raises(ValueError, match="4 of 3000 .*at most 0.1% are skipped"):
        restarted.add([Unreadable(4, "d", "empty")])


def test_a_set_that_never_decodes_says_so(mesh):
    with pytest.raises(ValueError, match="8 images drawn in a row do not decode"):
        batches_of(data(Pngs(broken=tuple(range(60)))), mesh)
    with pytest.raises(ValueError, match="60 images drawn in a row do not decode"):
        list(pipeline.eval_batches(Pngs(broken=tuple(range(60))), GRAY, 16, mesh))


@dataclasses.dataclass(kw_only=True)
class Fails:
    """Replaces the image by `value`, or raises `error`."""

    value: object = None
    error: Exception | None = None

    def __call__(self, example, rng):
        if self.error is not None:
            raise self.error
        return example | {"image": self.value}


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (data(Pngs(no_file=(5,))), OSError, "/digits/5.png: No such file"),
        (data(Pngs(wrong_label=(5,))), ValueError, "5.png: label 10, but the source"),
        (data(Pngs(wide=(5,))), ValueError, '"image" is 8x.*of its batch.*CentralCrop'),
        (data(ops=()), ValueError, r'"image" is bytes after the last op.*Decode\(\)'),
        (
            data(ops=(Fails(value=np.full((2, 2, 1), np.nan, np.float32)),)),
            ValueError,
            '.png: "image" holds NaN or infinity',
        ),
        (
            data(ops=(Decode(channels=1), CentralCrop(size_px=99))),
            ValueError,
            r"/digits/\d+\.png: ",
        ),
        (data(ops=(Fails(error=KeyError("lost")),)), KeyError, "lost"),
    ],
)
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_reaches_the_main_thread_with_the_name(
    mesh, config, kind, words, threads
):
    config = dataclasses.replace(config, threads=threads)
    with pytest.raises(kind, match=words):
        batches_of(config, mesh, count=8)
    assert not our_threads()


def test_an_op_that_breaks_says_at_which_example(mesh):
    with pytest.raises(KeyError) as broken:
        batches_of(data(ops=(Fails(error=KeyError("lost")),)), mesh)
    assert broken.value.__notes__[0].startswith("while example /digits/")


def test_an_integer_that_int32_cannot_hold_is_refused():
    batch = HostBatch(1, range(2))
    image = np.zeros((2, 2, 3), np.uint8)
    for wrong in (np.int64(2**31), 2**31, np.array(2**31, np.uint32)):
        with pytest.raises(ValueError, match='"id" is 2147483648, outside int32'):
            batch.store(0, {"image": image, "id": wrong})
    with pytest.raises(ValueError, match='"id" is -2147483649, outside int32'):
        batch.store(0, {"image": image, "id": np.array([7, -(2**31) - 1])})
    batch.store(0, {"image": image, "id": -(2**31)})
    with pytest.raises(ValueError, match="has the keys"):
        batch.store(1, {"image": image})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"threads": 0}, "data.threads=0"),
        ({"processes": -1}, "data.processes=-1"),
        ({"ops": (Decode,)}, "with the parentheses"),
    ],
)
def test_a_stream_refuses_what_cannot_work(fields, words):
    with pytest.raises(ValueError, match=words):
        data(**fields)


def test_a_stream_does_not_open_its_source():
    @dataclasses.dataclass(kw_only=True)
    class Closed(Pngs):
        def __len__(self) -> int:
            raise FileNotFoundError("not prepared")

    pipeline.Stream(source=Closed(), batch_size=4)


def test_a_batch_larger_than_the_set_is_refused_with_both_numbers(mesh):
    words = "data.batch_size=64 is larger than the data set, 60 images.*batch_size=32"
    with pytest.raises(ValueError, match=words):
        batches_of(data(batch_size=64), mesh)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(mesh):
    with pytest.raises(
        ValueError, match="batch_size=20 .* 8 devices; use .*batch_size=16 or 24"
    ):
        batches_of(data(batch_size=20), mesh)
    with pytest.raises(ValueError, match="batch_size=5 .* 8 devices; use .*=8 or 16"):
        pipeline.eval_batches(Pngs(), GRAY, 5, mesh)


def test_an_empty_evaluation_set_is_refused(mesh):
    with pytest.raises(ValueError, match="evaluation set is empty"):
        pipeline.eval_batches(Pngs(size=0), GRAY, 8, mesh)


def test_a_seed_outside_32_bits_is_refused(mesh):
    with pytest.raises(ValueError, match="seed=-1"):
        batches_of(data(), mesh, seed=-1)


@dataclasses.dataclass(kw_only=True)
class Slow:
    """Takes 20 ms for an image."""

    def __call__(self, example, rng):
        time.sleep(0.02)
        return example


def test_leaving_early_is_quick_and_leaves_no_thread(mesh):
    with pytest.raises(KeyboardInterrupt):
        config = data(ops=(*GRAY, Slow()), threads=4, batch_size=40)
        with pipeline.open_batches(config, 0, mesh) as batches:
            next(batches.starting_at(1))
            start = time.perf_counter()
            raise KeyboardInterrupt
    assert time.perf_counter() - start < 1
    assert not our_threads()
    for _ in pipeline.eval_batches(Pngs(), (*GRAY, Slow()), 8, mesh):
        break
    gc.collect()
    assert not our_threads()


def test_stages_are_measured(mesh):
    config = data(ops=(*GRAY, Slow()), threads=2)
    with pipeline.open_batches(config, 0, mesh) as batches:
        iterator = batches.starting_at(1)
        for _ in range(4):
            next(iterator)
        stages = batches.stages()
    assert list(stages) == ["read", "Decode", "Slow"]
    assert all(images >= 8 and 0 < s < 1 for s, images in stages.values())


def test_batches_are_ready_before_they_are_asked_for(mesh):
    with pipeline.open_batches(data(), 0, mesh) as batches:
        iterator = batches.starting_at(1)
        next(iterator)
        time.sleep(1)
        start = time.perf_counter()
        for _ in range(pipeline.AHEAD - 1):
            next(iterator)
        assert time.perf_counter() - start < 0.1


def test_the_threads_follow_the_cores(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: 64)
    assert workers.resolve_threads(None) == 8
    assert workers.resolve_threads(None, processes=16) == 4
    assert workers.resolve_threads(30) == 30


def test_the_generator_of_a_position_is_philox_with_its_key():
    reused = ExampleGenerator(seed=7)
    for position in (0, 3, 10**12):
        fresh = np.random.Generator(np.random.Philox(key=[7, position]))
        drawn = reused.at(position)
        np.testing.assert_array_equal(drawn.random(5), fresh.random(5))
        assert drawn.integers(9, dtype=np.uint8) == fresh.integers(9, dtype=np.uint8)


def test_a_batch_on_the_device_is_never_overwritten(mesh):
    kept = []
    with pipeline.open_batches(data(threads=2), 0, mesh) as batches:
        for batch in itertools.islice(batches.starting_at(1), 12):
            kept.append((batch, np.array(batch["image"])))
    for batch, copy in kept:
        np.testing.assert_array_equal(np.asarray(batch["image"]), copy)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow(mesh):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()

    @dataclasses.dataclass(kw_only=True)
    class Jpegs(Pngs):
        def __getitem__(self, index: int) -> dict[str, object]:
            return {"image": jpeg, "label": 1}

    config = data(Jpegs(), ops=(DecodeInceptionCrop(size_px=160),), threads=2)
    with pipeline.open_batches(config, 0, mesh) as batches:
        iterator = batches.starting_at(1)
        for _ in range(10):
            next(iterator)
        before = resident_bytes()
        for _ in range(40):
            next(iterator)
        grown = resident_bytes() - before
    # 40 batches are 49 MB; 15 MB is the noise of the allocator.
    assert grown < 15e6


def test_makers_travel_to_worker_processes():
    maker = pickle.loads(pickle.dumps(TrainingBatches(Pngs(), NOISY, 0, 8)))
    batch = HostBatch(1, range(8))
    maker.fill(batch, batch.rows)
    assert batch.arrays["image"].shape == (8, 8, 8, 1)
