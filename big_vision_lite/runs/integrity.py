"""Verifies checkpoints: leaf checksums, file digests and the manifest.

Orbax loads flipped bytes silently. So every leaf is summed on the device before it is
written, every file is digested after, and both go into a manifest written last: a step
folder without a manifest is incomplete, and one that disagrees with it is damaged.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from big_vision_lite import trees
from big_vision_lite.runtime import files
from big_vision_lite.types import Array

MANIFEST = "manifest.json"


class DamagedCheckpoint(ValueError):
    """A file or leaf of a checkpoint that differs from what was saved."""


def leaf_checksum(x: Array) -> Array:
    """Returns a uint32 checksum that any flipped bit of `x` changes, equal on any mesh.

    Every word is mixed with its position, then all are summed modulo 2**32: the order
    of summation, and so the layout over devices, does not matter.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.full(words.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = _mix(position ^ (index * jnp.uint32(0x85EBCA6B) + jnp.uint32(axis)))
    # Adding before mixing keeps the map one-to-one in the word at every position.
    return jnp.sum(_mix(words + position), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """Scrambles 32 bits reversibly (the finaliser of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def checksums(tree: Any) -> list[Array]:
    """Returns the checksum of every leaf, a uint32 each, in the order of names."""
    sums = []
    for leaf in jax.tree.leaves(tree):
        sums.append(_checksum_program(leaf.shape, leaf.dtype, leaf.sharding)(leaf))
        # XLA:CPU deadlocks when several programs wait for other devices.
        if jax.default_backend() == "cpu" and jax.device_count() > 1:
            sums[-1].block_until_ready()
    return sums


def compile_checksums(abstract: Any) -> None:
    """Compiles the programs of `checksums` in advance; may run in a thread.

    `abstract` has the shape, dtype and sharding of every leaf.
    """
    for leaf in jax.tree.leaves(abstract):
        _checksum_program(leaf.shape, leaf.dtype, leaf.sharding)


@functools.cache
def _checksum_program(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding
) -> Callable[[Array], Array]:
    # One small program per shape: a state has hundreds of leaves of a dozen shapes, and
    # one program for all of them takes four times as long to compile.
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jax.jit(leaf_checksum).lower(leaf).compile()


def describe_leaves(tree: Any, sums: Any) -> dict[str, dict[str, Any]]:
    """Returns the manifest's record of every leaf: shape, dtype, checksum."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "checksum": f"{int(total):08x}",
        }
        for (name, leaf), total in zip(trees.flatten(tree).items(), sums, strict=True)
    }


def damaged_leaves(leaves: Mapping[str, Any], tree: Any) -> list[str]:
    """Returns the names of leaves of `tree` whose checksum differs from the record."""
    found = describe_leaves(tree, jax.device_get(checksums(tree)))
    return [n for n, leaf in found.items() if leaf["checksum"] != leaves[n]["checksum"]]


def check_leaves(
    expected: Mapping[str, Any], manifest: Mapping[str, Any], folder: epath.Path
) -> None:
    """Checks that a checkpoint's leaves {name: leaf} are the expected ones.

    Raises:
        ValueError: names, shapes or dtypes differ; lists them with "+" and "-".
    """
    saved = {
        name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
        for name, leaf in manifest["leaves"].items()
    }
    ours, theirs = "this recipe", "the checkpoint"
    lines = trees.difference(expected, saved, ours, theirs)
    for name in sorted(expected.keys() & saved.keys()):
        if expected[name].dtype != saved[name].dtype:
            lines.append(f"  + {name} {trees.describe(expected[name])}  in {ours}")
            lines.append(f"  - {name} {trees.describe(saved[name])}  in {theirs}")
    if lines:
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(
            f"{folder} and the recipe differ:\n" + "\n".join(lines[:20]) + more + "\n"
            "Use a new --workdir, or start from its weights with --config.init.path="
            f"{folder}"
        )


def digest_files(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Returns {relative path: {"bytes": size, "sha256": digest}} of all files."""
    found = {}
    for path in _files(folder):
        relative = str(path.relative_to(folder))
        if relative != MANIFEST:
            found[relative] = {
                "bytes": path.stat().length,
                "sha256": _sha256(path),
            }
    return found


def write_manifest(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, with a digest of itself, in one atomic move."""
    body = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
    document = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
    files.replace(folder / MANIFEST, json.dumps(document))


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Reads the manifest of a step folder.

    Raises:
        DamagedCheckpoint: it is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DamagedCheckpoint(
            f"{folder} has no {MANIFEST}: the save was never finished, or the file was "
            "not copied along."
        )
    try:
        document = json.loads(path.read_text())
        body = document["body"]
        digest = hashlib.sha256(body.encode()).hexdigest()
        if digest != document["sha256"]:
            raise ValueError("its digest differs")
        return json.loads(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}).") from error


def verify_files(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Checks every file of a step folder against its manifest.

    Raises:
        DamagedCheckpoint: names the first missing, truncated or changed file.
    """
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise DamagedCheckpoint(f"{path} is missing.")
        size = path.stat().length
        if size != recorded["bytes"]:
            raise DamagedCheckpoint(
                f"{path} has {size} bytes, {recorded['bytes']} were saved."
            )
        if _sha256(path) != recorded["sha256"]:
            raise DamagedCheckpoint(f"{path} is not what was saved (digest differs).")


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir(), key=str):
        found.extend(_files(path) if path.is_dir() else [path])
    return found
