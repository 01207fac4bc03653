"""Starts a run from another run's parameters: drop, rename, resample, report."""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_lite import layout, resample, serialize, step_folder, trees
from big_vision_lite.conversion import foreign, weights
from big_vision_lite.types import Array

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Weights to start from: {name: array}, batch statistics as "batch_stats/...".

    `class_names` are empty when nobody knows them; `model` is what the weights belong
    to where another library says so, else None; `origin` goes into manifests.
    """

    variables: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    model: Any = None
    origin: Mapping[str, Any] | None = None


def open_weights(path: str, log: Callable[[str], None] = print) -> Loaded:
    """Reads a run, a step folder, or weights of another library (see `foreign`).

    Raises:
        FileNotFoundError: there is neither; says what was looked at.
        ValueError: the weights are damaged or in no known format.
    """
    if weights.is_foreign(path):
        found = foreign.load(path)
        for note in (f"{path}: {found.format}", *found.notes):
            log(f"init: {note}")
        return Loaded(
            variables=found.variables,
            class_names=found.class_names,
            model=found.model,
            origin=found.origin,
        )
    variables, manifest = load_variables(step_folder.find(path, log))
    return Loaded(
        variables=variables,
        class_names=tuple(manifest["class_names"]),
        origin=manifest.get("origin"),
    )


def load_variables(folder: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Loads a step folder's parameters and batch statistics, and its manifest.

    Names are those of the model, statistics "batch_stats/...". The averaged parameters
    are taken when the run kept an average.

    Raises:
        DamagedCheckpoint: a file or a leaf is not what was saved.
    """
    manifest = step_folder.verified_manifest(folder)
    leaves = manifest["leaves"]
    averaged = any(name.startswith("ema/") for name in leaves)
    parts = ("ema/" if averaged else "params/", "frozen/", "collections/batch_stats/")
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
        if name.startswith(parts)
    }
    loaded = trees.flatten(step_folder.restore_part(folder, named, manifest))
    return {n.split("/", 1)[1]: np.asarray(x) for n, x in loaded.items()}, manifest


def model_differences(ours: Any, theirs: Any) -> list[str]:
    """Lists the fields of two models that change what the same weights compute.

    Empty for models of different classes: there the names differ, and are listed.
    """
    if type(ours) is not type(theirs):
        return []
    lines = []
    for field in serialize.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in _ADAPTED and mine != other:
            lines.append(
                f"the weights were made for {field.name}={other}, this recipe has "
                f"{mine}: the features will differ. To follow the weights: "
                f"--config.model.{field.name}={other}"
            )
    return lines


# Fields that may differ: they are adapted, listed otherwise, or change no result.
_ADAPTED = {
    *("head", "dtype", "remat", "attention", "dropout", "stochastic_depth"),
    *("patch_size", "width", "depth", "mlp_dim", "stages", "statistics"),
}


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
    for name in sorted(wanted.keys() & kept.keys()):
        if kept[name].shape != wanted[name].shape:
            fitted = resample.fit(name, kept[name], wanted[name].shape)
            kept[name] = fitted.values
            if fitted.message:
                _say_resized(name, fitted.message, init, log)
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
    other = " with other names" if count["loaded"] == count["fresh"] else ""
    log(
        f"Head has {count['loaded']} classes, data {count['fresh']}{other}: new head "
        '(zero init). To refuse instead: --config.init.drop=""'
    )
    return head


def _say_resized(
    name: str, message: str, init: Init, log: Callable[[str], None]
) -> None:
    if not name.endswith(resample.POSITIONS):
        log(f"init: {message}")
    elif init.position_resize == PositionResize.ERROR:
        raise ValueError(
            f"{message} Refused by --config.init.position_resize=error; allow it with "
            "--config.init.position_resize=bilinear."
        )
    else:
        log(f"{message} --config.init.position_resize=error to forbid.")
