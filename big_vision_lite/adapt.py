"""Starts a run from another run's parameters: drop, rename, resample, report."""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite import resample, trees
from big_vision_lite.types import Array

# A distilled model has two.
HEADS = ("head/", "distillation_head/")


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
    head = {name for name in names if name.startswith(HEADS)}
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
