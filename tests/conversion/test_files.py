"""What a weight file is, its bytes tell; what is no plain array is refused."""

import argparse
import json
import pathlib
import pickle
import shlex
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from big_vision_lite.conversion import engine, foreign
from big_vision_lite.conversion import files as weights

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/kernel": RNG.normal(size=(3, 4)).astype(np.float32),
    "a/bias": RNG.normal(size=4).astype(np.float32),
}


def assert_arrays(found, expected=ARRAYS):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", ["model.bin", "weights", "x.npz", "ä b.pth"])
def test_the_format_is_found_by_content_not_by_name(name, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        np.savez(file, **ARRAYS)
    assert_arrays(weights.read(str(path)).arrays)
    safetensors.numpy.save_file(ARRAYS, path)
    assert_arrays(weights.read(str(path)).arrays)


def test_bfloat16_that_numpy_stored_as_void_is_read(tmp_path):
    half = ARRAYS["a/kernel"].astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", a=half.view("V2"), b=ARRAYS["a/bias"])
    found = weights.read(str(tmp_path / "x.npz")).arrays
    assert found["a"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], half.astype(np.float32))


def test_half_precision_safetensors_are_read(tmp_path):
    half = {"x": ARRAYS["a/kernel"].astype(ml_dtypes.bfloat16)}
    whole = {"x": ARRAYS["a/kernel"].astype(np.float16)}
    for stored in (half, whole):
        safetensors.numpy.save_file(stored, tmp_path / "x")
        found = weights.read(str(tmp_path / "x")).arrays
        np.testing.assert_array_equal(found["x"], stored["x"].astype(np.float32))


EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
WHOLE = {"I8": np.int8, "U16": np.uint16, "I64": np.int64, "BOOL": np.bool_}


def write_safetensors(path, arrays):
    """Writes {name: (dtype as the format names it, shape, bytes)}."""
    header, body = {}, b""
    for name, (kind, shape, data) in arrays.items():
        span = [len(body), len(body) + len(data)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": span}
        body += data
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("kind", [*EIGHT_BITS, *WHOLE])
def test_every_type_that_has_a_meaning_is_read(kind, tmp_path):
    values = np.array([[0.5, 1.0], [2.0, 4.0]])
    array = values.astype((EIGHT_BITS | WHOLE)[kind])
    arrays = {"a": (kind, (2, 2), array.tobytes()), "none": (kind, (0, 3), b"")}
    write_safetensors(tmp_path / "x", arrays)
    found = weights.read(str(tmp_path / "x")).arrays
    np.testing.assert_array_equal(found["a"], array.astype(found["a"].dtype))
    assert found["a"].dtype == (np.float32 if kind in EIGHT_BITS else array.dtype)
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F6_E3M2", "F3", "Q4_K", 7])
def test_types_without_a_meaning_are_named(kind, tmp_path):
    write_safetensors(tmp_path / "x", {"a.weight": (kind, (2, 4), bytes(4))})
    message = f"x stores a.weight as {kind}, .* not read. Open it with the library"
    with pytest.raises(ValueError, match=message):
        weights.read(str(tmp_path / "x"))


def test_weights_beyond_the_range_of_float8_are_named(tmp_path):
    array = np.array([1.0, 900.0]).astype(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path / "x", {"fc": ("F8_E4M3", (2,), array.tobytes())})
    with pytest.raises(ValueError, match="x: fc is stored as float8_e4m3fn, .* 448"):
        weights.read(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "array, words",
    [
        (np.ones((2, 3), np.int8), r"integers \(int8\), .*quantised"),
        (np.ones((2, 3), np.complex64), r"complex numbers \(complex64\)"),
        (np.ones((2, 3), bool), r"booleans \(bool\)"),
        (np.full((2, 3), "one"), "no numbers that numpy knows"),
        (np.ones((2, 3), ml_dtypes.float8_e5m2).view("V1"), "no numbers"),
    ],
)
def test_other_values_than_floats_are_no_weights(array, words):
    entries = [engine.dense("a.weight", "a/kernel"), engine.same("b", "b")]
    theirs = {"a.weight": array, "b": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=f"  - a.weight  holds {words}"):
        engine.read(entries, theirs, {"a/kernel": (3, 2), "b": (2,)}, what="x")


def test_tensors_that_are_no_plain_arrays_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    plain = torch.arange(6.0).reshape(2, 3)
    for kind in (torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.complex64):
        torch.save({"a": plain.to(kind)}, tmp_path / "x.pth")
        found = weights.read(str(tmp_path / "x.pth")).arrays["a"]
        np.testing.assert_array_equal(found.real, plain.numpy())
        assert found.dtype.kind == {torch.int8: "i", torch.complex64: "c"}.get(
            kind, "f"
        )
    for tensor in (plain.to_sparse(), torch.empty(2, 3, device="meta")):
        torch.save({"a": tensor}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="x.pth stores a as torch.*not read"):
            weights.read(str(tmp_path / "x.pth"))


def test_torch_archives_are_opened_by_torch_tensors_only(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save({**tensors, "epoch": 3}, tmp_path / "x.pth")
    assert_arrays(weights.read(str(tmp_path / "x.pth")).arrays)
    torch.save(tensors, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_arrays(weights.read(str(tmp_path / "old")).arrays)


# The names by which a ViT of timm is known, each array another one.
VIT = {
    name: np.full((2, 2), index, np.float32)
    for index, name in enumerate(
        ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    )
}


def tensors(arrays, prefix=""):
    torch = pytest.importorskip("torch")
    return {
        f"{prefix}{name}": torch.from_numpy(array) for name, array in arrays.items()
    }


def run(command, folder):
    """Runs `python -c ...` with this python, as a shell reads it."""
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True)


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_arguments_of_a_training_script_are_no_hindrance(as_zip, tmp_path):
    torch = pytest.importorskip("torch")
    content = {"model": tensors(VIT), "args": argparse.Namespace(lr=0.1, gpus=[0, 1])}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    assert_arrays(weights.read(str(path)).arrays, VIT)
    # Only while the file is read.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_other_objects_are_named_and_the_command_takes_the_weights_out(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"model": tensors(VIT), "out": pathlib.PurePosixPath("a")}, path)
    with pytest.raises(ValueError) as caught:
        weights.read(str(path))
    message = str(caught.value)
    assert "holds more than tensors: pathlib" in message
    assert "only for files from people you trust" in message
    assert "\x1b" not in message and "again" not in message
    command = message[message.index("python -c") : message.index(" (elsewhere")]
    run(command, tmp_path)
    assert_arrays(weights.read(str(tmp_path / "only_model.pth")).arrays, VIT)


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (self._path, "w")


def harmful_torch(path, trap):
    torch = pytest.importorskip("torch")
    torch.save({"a": Harmful(trap)}, path)


def harmful_arguments(path, trap):
    torch = pytest.importorskip("torch")
    arguments = argparse.Namespace(lr=0.1, log=Harmful(trap))
    torch.save({"model": {"a": torch.ones(2)}, "args": arguments}, path)


def harmful_pickle(path, trap):
    pytest.importorskip("torch")
    path.write_bytes(pickle.dumps({"a": Harmful(trap)}))


def harmful_npz(path, trap):
    array = np.array([Harmful(trap)], dtype=object)
    with path.open("wb") as file:
        np.savez(file, a=array)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (harmful_torch, r"holds more than tensors: \S*open\."),
        (harmful_arguments, r"holds more than tensors: \S*open\."),
        (harmful_pickle, "no torch file of tensors alone"),
        (harmful_npz, "pickled Python objects.*never loaded"),
    ],
)
def test_no_file_runs_code(make, message, tmp_path):
    trap = tmp_path / "trap"
    make(tmp_path / "x", str(trap))
    with pytest.raises(ValueError, match=message):
        weights.read(str(tmp_path / "x"))
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 7, 30, 100, -1])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_truncated_files_are_refused_by_name(kind, keep, tmp_path):
    path = tmp_path / f"cut.{kind}"
    if kind == "npz":
        np.savez(path, **ARRAYS)
    else:
        safetensors.numpy.save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"cut.{kind}.*(again|Read are)"):
        weights.read(str(path))


def test_a_truncated_torch_file_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(1000)}, path)
    for keep in (100, 2000, -1):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="cut.pth"):
            weights.read(str(path))
        path.write_bytes(whole)


def test_a_state_dict_without_tensors_is_none(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"epoch": 3}, tmp_path / "x")
    with pytest.raises(ValueError, match="dict without tensors"):
        weights.read(str(tmp_path / "x"))


def test_flax_msgpack_checkpoints_are_named(tmp_path):
    # What flax.serialization.to_bytes({"params": {}, "step": 0}) begins with.
    (tmp_path / "checkpoint_10000").write_bytes(b"\x82\xa6params\x80\xa4step\x00")
    with pytest.raises(ValueError) as caught:
        weights.read(str(tmp_path / "checkpoint_10000"))
    assert str(caught.value).startswith(
        "checkpoint_10000 is a Flax msgpack training checkpoint: this format is not "
        "read. Read are: Orbax run folders, .safetensors, .npz, torch's .pth"
    )


@pytest.mark.parametrize("content", [b"hello world, no weights", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_no_weights(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is no weight file"):
        weights.read(str(tmp_path / "x"))


def test_a_zip_that_is_no_archive_of_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="x.zip"):
        foreign.load(str(tmp_path / "x.zip"))


def test_names_of_no_known_model_are_shown(tmp_path):
    np.savez(tmp_path / "x.npz", **ARRAYS)
    with pytest.raises(ValueError, match="2 arrays .a/kernel, a/bias.*Known are:.*ViT"):
        foreign.load(str(tmp_path / "x.npz"))


def test_a_folder_brings_its_configuration_along(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    found = weights.read(str(tmp_path))
    assert found.config == {"model_type": "vit"} and found.preprocessor == {}
    assert weights.read(str(tmp_path / "model.safetensors")).config == found.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        weights.read(str(tmp_path))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        weights.read(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds no weights.*notes.txt"):
        weights.read(str(tmp_path))
    assert not weights.is_foreign(str(tmp_path))


def test_a_download_without_client_or_network_says_what_to_type(monkeypatch):
    with pytest.raises(ValueError, match="hub:nobody/nothing.*(could not|pip install)"):
        weights.read("hub:nobody/nothing")


def in_parts(folder, arrays, **changes):
    """Writes weights as transformers does above a size: parts, and an index."""
    names = sorted(arrays)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: arrays[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where | changes}))
    return index


def test_weights_in_parts_are_read_by_their_index(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}": rng.normal(size=3).astype(np.float32) for i in range(5)}
    index = in_parts(tmp_path, arrays)
    for path in (index, tmp_path):
        found = weights.read(str(path)).arrays
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[n], arrays[n]) for n in arrays)
    assert weights.is_foreign(str(tmp_path))
    whole = weights.read(str(index)).arrays
    assert all(whole[n].dtype == np.float32 for n in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer.0": "model-3.safetensors"}, "names model-3.safetensors, which is not"),
        ({"layer.0": "../model.safetensors"}, "which is not beside it"),
        ({"layer.9": "model-00001-of-00002.safetensors"}, "names layer.9, which no"),
    ],
)
def test_an_index_of_other_files_is_refused(changes, message, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    arrays = {f"layer.{i}": np.zeros(2, np.float32) for i in range(3)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        weights.read(str(in_parts(folder, arrays, **changes)))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="is JSON, but no index of weight files"):
        weights.read(str(folder / "config.json"))
