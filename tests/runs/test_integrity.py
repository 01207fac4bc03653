import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from big_vision_lite.runs import integrity
from big_vision_lite.runs.integrity import DamagedCheckpoint
from big_vision_lite.runtime import sharding
from big_vision_lite.runtime.sharding import Mesh

DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_, jnp.float16]
checksum = jax.jit(integrity.leaf_checksum)


@functools.cache
def leaf(dtype) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 30, (3, 5))
    if dtype == jnp.bool_:
        return values > 0
    return np.asarray(jnp.asarray(values).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_checksum(dtype):
    original = leaf(dtype)
    flipped = []
    for index in range(original.nbytes):
        for bit in range(8 if original.dtype != bool else 1):
            data = bytearray(original.tobytes())
            data[index] ^= 1 << bit
            flipped.append(np.frombuffer(bytes(data), original.dtype))
    stack = jnp.asarray(np.stack(flipped).reshape(-1, *original.shape))
    sums = jax.jit(jax.vmap(integrity.leaf_checksum))(stack)
    assert len(sums) == original.size * original.dtype.itemsize * (
        8 if original.dtype != bool else 1
    )
    assert not np.any(np.asarray(sums) == np.asarray(checksum(original)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_depends_on_the_order_of_values(dtype):
    original = leaf(dtype).copy()
    total = int(checksum(original))
    flat = original.reshape(-1)
    swapped = 0
    for i in range(flat.size):
        for j in range(i):
            if flat[i] != flat[j]:
                other = flat.copy()
                other[[i, j]] = other[[j, i]]
                assert int(checksum(other.reshape(original.shape))) != total
                swapped += 1
    assert swapped > 10
    assert int(checksum(original.T.copy().reshape(5, 3))) != total
    assert int(checksum(np.zeros((2, 4), np.float32))) != int(
        checksum(np.zeros((4, 2), np.float32))
    )


def numpy_checksum(x: np.ndarray) -> int:
    """The same sum, word by word, with Python's integers."""
    mask = 0xFFFFFFFF

    def mix(v):
        v = ((v ^ (v >> 16)) * 0x85EBCA6B) & mask
        v = ((v ^ (v >> 13)) * 0xC2B2AE35) & mask
        return v ^ (v >> 16)

    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    words, total = x.view(kind), 0
    for index in np.ndindex(x.shape):
        position = 0x9E3779B9
        for axis, i in enumerate(index):
            position = mix(position ^ ((i * 0x85EBCA6B + axis) & mask))
        total += mix((int(words[index]) + position) & mask)
    return total & mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_that_of_a_double_loop(dtype):
    assert int(checksum(leaf(dtype))) == numpy_checksum(leaf(dtype))
    assert int(checksum(leaf(dtype)[0, 0])) == numpy_checksum(leaf(dtype)[0, 0])


def test_the_checksum_of_one_device_is_that_of_two_and_eight():
    values = {
        "a": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
        "b": np.arange(64, dtype=np.uint8),
        "c": np.float32(3),
    }
    found = []
    for count in (1, 2, 8):
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=-1), jax.devices()[:count])
        specs = {"a": PartitionSpec(None, "fsdp"), "b": PartitionSpec("fsdp")}
        placed = {
            n: jax.device_put(x, NamedSharding(mesh, specs.get(n, PartitionSpec())))
            for n, x in values.items()
        }
        found.append(jax.device_get(integrity.checksums(placed)))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert [int(x) for x in found[0]] == [
        numpy_checksum(np.asarray(x)) for x in values.values()
    ]


def test_nan_infinity_and_both_zeros_are_told_apart():
    special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf], np.float32)
    sums = {int(checksum(x)) for x in special}
    assert len(sums) == 6


def test_a_damaged_leaf_is_named():
    tree = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2)), "d": jnp.ones(3)}}
    sums = jax.device_get(integrity.checksums(tree))
    recorded = integrity.describe_leaves(tree, sums)
    assert recorded["b/c"]["shape"] == [2, 2] and recorded["b/c"]["dtype"] == "float32"
    assert integrity.damaged_leaves(recorded, tree) == []
    tree["b"]["c"] = tree["b"]["c"].at[1, 0].set(-0.0)
    assert integrity.damaged_leaves(recorded, tree) == ["b/c"]


def test_files_are_compared_by_presence_size_and_content(tmp_path):
    folder = epath.Path(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"12345")
    (tmp_path / "empty").write_bytes(b"")
    manifest = {"files": integrity.digest_files(folder)}
    assert set(manifest["files"]) == {"d/x", "empty"}
    integrity.write_manifest(folder, manifest)
    assert integrity.digest_files(folder) == manifest["files"]  # not of itself
    integrity.verify_files(folder, integrity.read_manifest(folder))
    for content, message in (
        (b"1234", "has 4 bytes, 5 were saved"),
        (b"12346", "is not what was saved"),
    ):
        (tmp_path / "d" / "x").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=f"d/x {message}"):
            integrity.verify_files(folder, manifest)
    (tmp_path / "d" / "x").unlink()
    with pytest.raises(DamagedCheckpoint, match="d/x is missing"):
        integrity.verify_files(folder, manifest)


def test_a_folder_without_manifest_is_said_to_have_none(tmp_path):
    with pytest.raises(DamagedCheckpoint, match="has no manifest.json: the save was"):
        integrity.read_manifest(epath.Path(tmp_path))
