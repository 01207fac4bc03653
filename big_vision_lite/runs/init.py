"""Builds the state before step 1: fresh, or with other weights adapted to it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite import trees
from big_vision_lite.config import Init, PositionResize, TrainConfig
from big_vision_lite.conversion.input_range import (
    SYMMETRIC,
    InputRange,
    fold_input_range,
)
from big_vision_lite.recipes import serialize
from big_vision_lite.runs import heads, resample
from big_vision_lite.runs.load import Loaded, open_weights
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.program import Program
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Array, Family, Model, backbone_of


def initial_state(
    config: TrainConfig,
    program: Program,
    first_params: Mapping[str, Any] | None,
    *,
    log: Callable[[str], None],
    note_origin: Callable[[Any], None],
) -> TrainState:
    """Returns the state before step 1: fresh, or with parameters from elsewhere.

    `first_params` {name: array} replace the checkpoint of `config.init`.

    Raises:
        ValueError: a checkpoint does not fit the model; lists every difference.
        OSError: a checkpoint is missing.
    """
    fresh = program.fresh()
    inits = config.init
    if first_params is not None:
        inits = inits or (Init(path="memory"),)
    if not inits:
        return fresh
    named = state_lib.variables(fresh)
    origins = []
    for init in inits:
        if first_params is not None:
            loaded = Loaded(variables=first_params, class_names=None)
        else:
            # A checkpoint may need the module of the recipe's own model class.
            modules = [type(config.model).__module__]
            loaded = open_weights(init.path, log, modules, init.part)
        origins.append(loaded.origin)
        classes = tuple(config.data.source.class_names)
        named = start_from(loaded, init, config.model, classes, named, log)
    if any(origins):
        note_origin(origins[0] if len(origins) == 1 else {"parts": origins})
    return state_lib.with_variables(fresh, named)


def start_from(
    loaded: Loaded,
    init: Init,
    model: Any,
    class_names: tuple[str, ...],
    named: Mapping[str, Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Returns `named`, variables of `model`, with those that `init` copies replaced.

    `class_names` are those of the data.
    """
    part, into = _places(loaded, model, init)
    # A teacher's head has its own classes, whatever those of the data are.
    beside = into not in ("", backbone_of(model)[0])
    model = _module(model, into)
    theirs: Any = loaded.backbone if part == loaded.part else None
    if loaded.model is not None:
        theirs = _module(loaded.model, part)
    ours = trees.inside(named, into)
    taken = trees.inside(loaded.variables, part)
    for names, where, whole in (
        (ours, f"init.into={into}", named),
        (taken, f"init.part={part}", loaded.variables),
    ):
        if not names:
            modules = sorted({name.split("/")[0] for name in whole})
            raise ValueError(
                f"{where} names no module with parameters. At the top there are: "
                f"{', '.join(modules)}."
            )
    if part or into:
        kinds = f" ({type(theirs).__name__})" if isinstance(theirs, Model) else ""
        log(
            f"init: {part or 'all'} of {init.path}{kinds} -> {into or 'the model'}: "
            f"{len(taken)} arrays"
        )
    family, lines = model, []
    path, backbone = backbone_of(model) if isinstance(model, Model) else ("", model)
    if path:
        # The backbone holds a model's input kernel and position embeddings.
        family = Within(path=path, inside=backbone)
        lines = model_differences(model, theirs, into)
        theirs = backbone_of(theirs)[1] if isinstance(theirs, Model) else theirs
    loaded = dataclasses.replace(loaded, variables=taken, model=theirs)
    loaded = scaled_like(loaded, family, ours, log)
    where = "/".join(name for name in (into, path) if name)
    for line in (*lines, *model_differences(backbone, loaded.model, where)):
        log(f"init: {line}")
    kept = heads.kept(renamed(loaded.variables, init.rename), ours, init, family)
    same_classes = beside or heads.same_classes(
        loaded.class_names, class_names, init, kept, log
    )
    adapted = adapt(
        loaded.variables, ours, init, model=family, same_classes=same_classes, log=log
    )
    return {**named, **trees.outside(adapted, into)}


def _places(loaded: Loaded, ours: Model, init: Init) -> tuple[str, str]:
    """Returns the paths of the modules that `init` takes and fills, "" for all."""
    whole = type(loaded.model) is type(ours) or loaded.class_names is None
    part = "" if loaded.opened_part else init.part
    if whole and not (part or init.into):
        return "", ""
    return part or loaded.part, init.into or backbone_of(ours)[0]


class Part(Family):
    """A submodule without `Family` declarations: every property has its default."""


@dataclasses.dataclass(frozen=True)
class Within(Family):
    """A model with its backbone's properties, in the names of the whole model."""

    path: str
    inside: Any

    @property
    def input_kernel(self) -> str | None:
        kernel = self.inside.input_kernel
        return None if kernel is None else f"{self.path}/{kernel}"

    @property
    def head_modules(self) -> tuple[str, ...]:
        return tuple(f"{self.path}/{name}" for name in self.inside.head_modules)

    @property
    def position_embeddings(self) -> tuple[str, ...]:
        return tuple(f"{self.path}/{name}" for name in self.inside.position_embeddings)

    @property
    def reads_patches(self) -> bool:
        return self.inside.reads_patches

    @property
    def patch_size(self) -> int:
        return self.inside.patch_size

    @property
    def standardises_kernels(self) -> bool:
        return self.inside.standardises_kernels

    @property
    def mean(self) -> tuple[float, ...]:
        return self.inside.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.inside.std


def _module(model: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        model = getattr(model, name, None)
        if not isinstance(model, Model):
            return Part()
    return model


def scaled_like(
    loaded: Loaded,
    model: Family,
    fresh: Mapping[str, Any],
    log: Callable[[str], None] = print,
) -> Loaded:
    """Returns weights that expect pixels scaled with the mean and std of `model`.

    Patch embeddings see no padding, so the change is exact there, also to the number of
    channels in `fresh`, the variables of `model`. Other stems keep their weights; a
    line logged here, or one of `model_differences`, gives the fields to set.
    """
    theirs = loaded.model
    name = model.input_kernel
    if theirs is None or not (theirs.mean and model.mean):
        return loaded
    if name is None or name not in fresh or name not in loaded.variables:
        return loaded
    before = InputRange(theirs.mean, theirs.std)
    after = InputRange(model.mean, model.std)
    if before == after:
        return loaded
    kernel, channels = np.asarray(loaded.variables[name]), fresh[name].shape[2]
    ours = theirs.clone(mean=model.mean, std=model.std)
    if not model.reads_patches:
        if channels == kernel.shape[2] or max(len(values) for values in before) == 1:
            return loaded
        log(_not_folded(before, after, kernel.shape[2], channels))
        return dataclasses.replace(loaded, model=ours)
    bias_name = name.removesuffix("kernel") + "bias"
    if bias_name not in loaded.variables:
        return loaded
    bias = np.asarray(loaded.variables[bias_name])
    # A model that reads patches has this field.
    patch_size = getattr(model, "patch_size")  # noqa: B009
    fold = functools.partial(fold_input_range, patch_size=patch_size)
    log(
        f"init: pixels were scaled with mean {before.mean} and std {before.std}, now "
        f"with {after.mean} and {after.std}: folded into the patch embedding, exactly."
    )
    if channels != kernel.shape[2]:
        # Channels can be summed or repeated only if all have the same units.
        kernel, bias = fold(kernel, bias, before, SYMMETRIC)
        log(f"init: {resample.channels_message(model, kernel.shape[2], channels)}")
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


def model_differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Returns a line per differing field that changes the output of the same weights.

    `where` is the path of `ours` in the recipe's model, "" for all of it. Models of
    different classes give []: their names differ, and `adapt` lists those.
    """
    if type(ours) is not type(theirs) or not isinstance(ours, Model):
        return []
    lines = []
    path = ".".join(("model", *where.split("/"))) if where else "model"
    for field in serialize.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in (*ours.free_fields, ours.backbone):
            continue
        if isinstance(mine, Model) and type(mine) is type(other):
            inside = "/".join(name for name in (where, field.name) if name)
            lines += model_differences(mine, other, inside)
        elif mine != other:
            lines.append(
                f"the weights were made for {field.name}={other}, this recipe has "
                f"{mine}: the features will differ. To follow the weights: "
                f"--config.{path}.{field.name}={other}"
            )
    return lines


def adapt(
    loaded: Mapping[str, Any],
    fresh: Mapping[str, Any],
    init: Init,
    *,
    model: Family,
    same_classes: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Array]:
    """Returns one array for every name in `fresh`, from `loaded` wherever it fits.

    `fresh` are the initialised parameters {name: array} of `model`; `same_classes`
    says whether both sides name the same classes in the same order.

    Raises:
        ValueError: names or shapes differ after drop, rename and resampling; lists
            every one of them with "+" and "-".
    """
    given = renamed(loaded, init.rename)
    dropped = heads.dropped(given, fresh, init, model, same_classes, log)
    kept = {name: leaf for name, leaf in given.items() if name not in dropped}
    wanted = {name: leaf for name, leaf in fresh.items() if name not in dropped}
    for name in sorted(wanted.keys() & kept.keys()):
        if kept[name].shape != wanted[name].shape:
            fitted = resample.fit(model, name, kept[name], wanted[name].shape)
            kept[name] = fitted.values
            if fitted.message:
                _say_resized(model, name, fitted.message, init, log)
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


def renamed(leaves: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
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


def _say_resized(
    model: Family, name: str, message: str, init: Init, log: Callable[[str], None]
) -> None:
    if name not in model.position_embeddings:
        log(f"init: {message}")
    elif init.position_resize == PositionResize.ERROR:
        raise ValueError(
            f"{message} Refused by --config.init.position_resize=error; allow it with "
            "--config.init.position_resize=bilinear."
        )
    else:
        log(f"{message} --config.init.position_resize=error to forbid.")
