"""Weights to start from: of a run of ours or of another library, and what they are."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from big_vision_lite import layout, resample, serialize, step_folder, trees
from big_vision_lite.conversion import foreign, weights
from big_vision_lite.conversion.input_range import (
    SYMMETRIC,
    InputRange,
    fold_input_range,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Weights to start from: {name: array}, batch statistics as "batch_stats/...".

    `class_names` are empty when nobody knows them; `model` is what the weights belong
    to, None where it needs a module that may not be imported here; `origin` goes into
    manifests.
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
    folder = step_folder.find(path, log)
    variables, manifest = load_variables(folder)
    return Loaded(
        variables=variables,
        class_names=tuple(manifest["class_names"]),
        model=_model_of(folder),
        origin={
            "path": path,
            "format": "big_vision_lite",
            "licence": None,
            "origin": manifest.get("origin"),
        },
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


def scaled_like(
    loaded: Loaded,
    model: Any,
    fresh: Mapping[str, Any],
    log: Callable[[str], None] = print,
) -> Loaded:
    """Returns weights that expect pixels scaled with the mean and std of `model`.

    Patch embeddings see no padding, so the change is exact there, also to the number of
    channels of the `fresh` variables of `model`; other stems keep their weights, and
    `model_differences`, or a line here, says what to set.
    """
    theirs = loaded.model
    name = resample.image_kernel(loaded.variables)
    # Modules of the user's own need not have a range.
    ranged = hasattr(theirs, "mean") and hasattr(model, "mean")
    if not ranged or name is None or name not in fresh:
        return loaded
    before = InputRange(theirs.mean, theirs.std)
    after = InputRange(model.mean, model.std)
    if before == after:
        return loaded
    kernel, channels = np.asarray(loaded.variables[name]), fresh[name].shape[2]
    ours = theirs.clone(mean=model.mean, std=model.std)
    if not name.endswith(resample.PATCHES):
        if channels == kernel.shape[2] or max(len(values) for values in before) == 1:
            return loaded
        log(_not_folded(before, after, kernel.shape[2], channels))
        return dataclasses.replace(loaded, model=ours)
    bias_name = name.removesuffix("kernel") + "bias"
    if bias_name not in loaded.variables:
        return loaded
    bias = np.asarray(loaded.variables[bias_name])
    fold = functools.partial(
        fold_input_range, patch_size=getattr(model, "patch_size", None)
    )
    log(
        f"init: pixels were scaled with mean {before.mean} and std {before.std}, now "
        f"with {after.mean} and {after.std}: folded into the patch embedding, exactly."
    )
    if channels != kernel.shape[2]:
        # Channels can take each other's place only where all are in the same units.
        kernel, bias = fold(kernel, bias, before, SYMMETRIC)
        log(f"init: {resample.channels_message(name, kernel.shape[2], channels)}")
        kernel, before = resample.resize_channels(kernel, channels), SYMMETRIC
    kernel, bias = fold(kernel, bias, before, after)
    return dataclasses.replace(
        loaded,
        variables={**loaded.variables, name: kernel, bias_name: bias},
        model=ours,
    )


def _not_folded(before: InputRange, after: InputRange, old: int, new: int) -> str:
    mean, std = (round(sum(values) / len(values), 3) for values in before)
    return (
        f"init: the weights were made for mean={before.mean} and std={before.std} of "
        f"{old} channels, this recipe has mean={after.mean} and std={after.std} for "
        f"{new}: the features will differ, because the stem pads with zeros, which are "
        "another gray in each range. The averages are near them: "
        f"'--config.model.mean=({mean},)' '--config.model.std=({std},)'"
    )


def _model_of(folder: Any) -> Any:
    document = json.loads((folder / step_folder.CONFIG).read_text())
    text = json.dumps({**document, "config": document["config"]["model"]})
    try:
        return serialize.from_json(text)
    except ValueError:
        # A class of the user's own, or of a newer version: the names decide alone.
        return None


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
    *("patch_size", "width", "depth", "mlp_dim", "stages"),
    *("statistics", "statistics_groups"),
    *("kernel_patch_size", "position_grid"),
    # Where parameters start that the weights bring.
    *("layer_scale", "last_scale"),
}
