"""Starts a run from another run's parameters: drop, rename, resample, report."""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_lite import layout, step_folder, trees
from big_vision_lite.types import Array

POSITIONS = "position_embedding"
HEAD = "head/"


class PositionResize(enum.StrEnum):
    """What to do when the grid of learned positions differs."""

    BILINEAR = "bilinear"
    ERROR = "error"


@dataclasses.dataclass(kw_only=True)
class Init:
    """Where the first parameters come from: a run folder or a step folder.

    Parameters matching `drop` keep their fresh values. None drops the head, and only
    the head, when it is made for other classes; "" drops nothing, so that a head of
    another shape is an error. `rename` holds "old=>new" pairs, regular expressions
    replaced in the checkpoint's names before they are compared.
    """

    path: str = ""
    drop: str | None = None
    rename: tuple[str, ...] = ()
    position_resize: PositionResize = PositionResize.BILINEAR

    def __post_init__(self):
        for pair in self.rename:
            if "=>" not in pair:
                raise ValueError(
                    f'init.rename: "{pair}" is not of the form "old=>new", for '
                    'example "backbone/=>encoder/".'
                )


def load_params(folder: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Loads a step folder's parameters {name: array} and its manifest.

    The averaged parameters are taken when the run kept an average.

    Raises:
        DamagedCheckpoint: a file or a leaf is not what was saved.
    """
    manifest = step_folder.verified_manifest(folder)
    leaves = manifest["leaves"]
    averaged = any(name.startswith("ema/") for name in leaves)
    wanted = ("ema/" if averaged else "params/", "frozen/")
    # Under a mesh of several devices jit takes no array that lives on one of them.
    mesh = jax.sharding.get_mesh()
    device = (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh.empty
        else layout.replicated(mesh)
    )
    named = {
        name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=device)
        for name, leaf in leaves.items()
        if name.startswith(wanted)
    }
    tree = step_folder.restore_part(folder, named, manifest)
    loaded = trees.flatten(tree)
    return {
        name.split("/", 1)[1]: np.asarray(leaf) for name, leaf in loaded.items()
    }, manifest


def adapt(
    loaded: Mapping[str, Any],
    fresh: Mapping[str, Any],
    init: Init,
    *,
    same_classes: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Array]:
    """Returns one array for every name in `fresh`, from `loaded` wherever it fits.

    `fresh` are the initialised parameters {name: array}; `same_classes` says whether
    both sides name the same classes in the same order.

    Raises:
        ValueError: names or shapes differ after drop, rename and resampling; lists
            every one of them with "+" and "-".
    """
    renamed = _renamed(loaded, init.rename)
    dropped = _dropped(renamed, fresh, init, same_classes, log)
    kept = {name: leaf for name, leaf in renamed.items() if name not in dropped}
    wanted = {name: leaf for name, leaf in fresh.items() if name not in dropped}
    for name in wanted.keys() & kept.keys():
        if name.endswith(POSITIONS) and kept[name].shape != wanted[name].shape:
            shape = wanted[name].shape
            kept[name] = _resample(name, kept[name], shape, init, log)
    lines = trees.difference(wanted, kept, "the model", "the checkpoint")
    if lines:
        module, _, leaf = lines[0].split()[1].rpartition("/")
        hint = f"{module}/.*" if module else leaf
        raise ValueError(
            f"init.path={init.path} and the model differ:\n"
            + "\n".join(lines[:30])
            + ("\n  ..." if len(lines) > 30 else "")
            + "\nTo start some from scratch: "
            f"--config.init.drop='{hint}'; to rename: "
            "--config.init.rename='(\"old=>new\",)'"
        )
    for name, leaf in kept.items():
        if not np.all(np.isfinite(leaf)):
            raise ValueError(f"init.path={init.path}: {name} holds NaN or infinity.")
    return {
        name: jnp.asarray(kept[name], leaf.dtype) if name in kept else leaf
        for name, leaf in fresh.items()
    }


def resample_positions(positions: Any, grid: tuple[int, int]) -> np.ndarray:
    """Resamples learned positions [rows, columns, D] to another grid.

    Bilinear with half-pixel centres, antialiased when shrinking, as FlexiViT does
    (arXiv:2212.08013); other programs have other forms, with other numbers.
    """
    shape = (*grid, positions.shape[-1])
    resized = jax.image.resize(jnp.asarray(positions), shape, "linear", antialias=True)
    return np.asarray(resized)


def _renamed(leaves: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    before: dict[str, str] = {}
    for old_name in leaves:
        name = old_name
        for pair in pairs:
            old, new = pair.split("=>", 1)
            name = re.sub(old, new, name)
        if name in before:
            raise ValueError(
                f"init.rename={tuple(pairs)}: {before[name]} and {old_name} both "
                f"become {name}; make the patterns narrower."
            )
        before[name] = old_name
    return {name: leaves[old] for name, old in before.items()}


def _dropped(
    loaded: Mapping[str, Any],
    fresh: Mapping[str, Any],
    init: Init,
    same_classes: bool,
    log: Callable[[str], None],
) -> set[str]:
    names = sorted(loaded.keys() | fresh.keys())
    if init.drop is not None:
        rules = [(init.drop, True)] if init.drop else []
        matched = trees.match(rules, names, default=False, what="init.drop")
        dropped = {name for name, value in matched.items() if value}
        for name in sorted(dropped):
            log(f"init: {name} starts from scratch (init.drop)")
        return dropped
    head = {name for name in names if name.startswith(HEAD)}
    fits = all(
        name in loaded and name in fresh and loaded[name].shape == fresh[name].shape
        for name in head
    )
    if not head or (fits and same_classes):
        return set()
    count = {
        what: leaves["head/kernel"].shape[-1] if "head/kernel" in leaves else "no"
        for what, leaves in (("loaded", loaded), ("fresh", fresh))
    }
    other = " other" if count["loaded"] == count["fresh"] else ""
    log(
        f"Head has {count['loaded']} classes, data {count['fresh']}{other}: new head "
        '(zero init). To refuse instead: --config.init.drop=""'
    )
    return head


def _resample(
    name: str,
    positions: Any,
    shape: tuple[int, ...],
    init: Init,
    log: Callable[[str], None],
) -> Any:
    if positions.ndim != len(shape) or positions.shape[-1] != shape[-1]:
        return positions  # another width: reported with the other differences
    old, new = positions.shape[:2], shape[:2]
    line = (
        f"Checkpoint grid {old[0]}x{old[1]}, model grid {new[0]}x{new[1]}: "
        "resizing position embedding (bilinear)."
    )
    if init.position_resize == PositionResize.ERROR:
        raise ValueError(
            f"{line} Refused by --config.init.position_resize=error; allow it with "
            "--config.init.position_resize=bilinear."
        )
    log(f"{line} --config.init.position_resize=error to forbid.")
    return resample_positions(positions, new)
