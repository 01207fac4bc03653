"""Finds, verifies, writes and loads the folder of one saved step.

`<run>/checkpoints/<step>/` holds the leaves, `config.json` and the manifest; a copy of
it elsewhere works as well.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from big_vision_lite import trees
from big_vision_lite.data.sources import file_kinds
from big_vision_lite.runs import integrity
from big_vision_lite.runtime import files

FOLDER = "checkpoints"
TRASH = "trash"
CONFIG = "config.json"


def complete_steps(folder: epath.Path) -> list[int]:
    """Returns the steps in `folder` that have a manifest, in increasing order."""
    if not folder.exists():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdigit() and (path / integrity.MANIFEST).exists()
    )


def verified_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns a step's manifest after a check of every file against it.

    Raises:
        DamagedCheckpoint: a file differs; names it, and the newest intact step.
    """
    with _suggesting_intact_step(folder):
        return _verify(folder)


def restore(folder: epath.Path, abstract: Any, manifest: Mapping[str, Any]) -> Any:
    """Loads a step's leaves in the shardings of `abstract` and checks every one.

    Raises:
        DamagedCheckpoint: a leaf's checksum differs; names it, and the newest intact
            step.
    """
    with _suggesting_intact_step(folder):
        state = _load(folder, abstract)
        damaged = integrity.damaged_leaves(manifest["leaves"], state)
        if damaged:
            raise integrity.DamagedCheckpoint(
                f"{folder}: {', '.join(damaged[:5])} differ from what was saved."
            )
    return state


def find(path: str | epath.Path, log: Callable[[str], None] = print) -> epath.Path:
    """Returns the newest step folder of a run or checkpoints folder, or `path` itself.

    Raises:
        FileNotFoundError: there is no complete checkpoint; says what is there.
    """
    given = files.absolute(path)
    what = "it is a file" if given.exists() else "it does not exist"
    wrong = file_kinds.fault(os.path.expanduser(path))
    if wrong and wrong[1] != file_kinds.GONE and not files.is_remote(given):
        what = f"it is {wrong[0]}" if wrong[0].startswith("a ") else wrong[0]
    if given.is_dir():
        if (given / integrity.MANIFEST).exists():
            return given
        incomplete = _incomplete(given)
        for folder in (given / FOLDER, given):
            steps = complete_steps(folder)
            if steps:
                newest = f"using step {steps[-1]}, the newest of {len(steps)} complete"
                log(f"{path}: {newest}{incomplete and f'; {incomplete}'}")
                return folder / str(steps[-1])
        seen = sorted(inside.name for inside in given.iterdir())[:5]
        what = incomplete or f"it holds {', '.join(seen) or 'nothing'}"
    raise FileNotFoundError(
        f"No complete checkpoint in {path}: {what}. Give a run folder, its "
        f"{FOLDER}/ folder, or one step folder with its {integrity.MANIFEST}."
    )


def _incomplete(given: epath.Path) -> str:
    """Names the steps that have no manifest in, below or at a folder; "" if none."""
    inside = [
        path
        for folder in (given / FOLDER, given)
        if folder.is_dir()
        for path in folder.iterdir()
    ]
    names = [
        path.name
        for path in (*inside, given)
        if path.name.isdigit() and path.is_dir()
        if not (path / integrity.MANIFEST).exists()
    ]
    if not names:
        return ""
    which = f"step{'s' * (len(names) > 1)} {', '.join(sorted(names, key=int))}"
    return (
        f"{which} {'are' if len(names) > 1 else 'is'} incomplete (no "
        f"{integrity.MANIFEST}: the save was cut short, or the file was lost)"
    )


def save_async(folder: epath.Path, state: Any) -> Any:
    """Starts to write `state`; it may be donated on return, `result()` waits.

    Of a large replicated array every device writes a part. Small ones are not split:
    every part is a program to compile in the first save.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    with context:
        return ocp.save_async(folder, state)


def restore_part(
    folder: epath.Path, wanted: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the leaves of `wanted` {name: shape with sharding} as nested dicts."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return restore(folder, trees.unflatten(wanted), manifest)


def _load(folder: epath.Path, abstract: Any) -> Any:
    try:
        return ocp.load(folder, abstract)
    except (RuntimeError, MemoryError):
        raise  # a fault of the device or the host, not of the file
    except Exception as error:  # Orbax raises a bare Exception for unreadable data
        cause = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise integrity.DamagedCheckpoint(
            f"{folder} cannot be read: {cause}"
        ) from error


@contextlib.contextmanager
def _suggesting_intact_step(folder: epath.Path) -> Iterator[None]:
    """Adds the newest intact step to the message of a DamagedCheckpoint."""
    try:
        yield
    except integrity.DamagedCheckpoint as error:
        message = f"{error}\n{_offer(folder)}"
        raise integrity.DamagedCheckpoint(message) from error


def _offer(damaged: epath.Path) -> str:
    beside = damaged.parent
    older = complete_steps(beside) if damaged.name.isdigit() else []
    for step in reversed([step for step in older if step < int(damaged.name)]):
        try:
            _verify(beside / str(step))
        except integrity.DamagedCheckpoint:
            continue
        trash = beside.parent / TRASH
        return (
            f"Step {step} is intact. To continue from it: mkdir -p '{trash}' "
            f"&& mv '{damaged}' '{trash}'/ and run the same command again."
        )
    return (
        "No other complete step is there. Restore the folder from a copy, or start "
        "again with a new --workdir."
    )


def _verify(folder: epath.Path) -> dict[str, Any]:
    manifest = integrity.read_manifest(folder)
    integrity.verify_files(folder, manifest)
    return manifest
