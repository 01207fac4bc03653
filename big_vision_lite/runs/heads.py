"""What becomes of the head of a checkpoint: kept for the same classes, or left out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from big_vision_lite import trees
from big_vision_lite.config import Init, MatchClasses
from big_vision_lite.messages import some
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.types import Family


def kept(
    loaded: Mapping[str, Any], fresh: Mapping[str, Any], init: Init, model: Family
) -> list[str]:
    """Returns the heads' parameters that fit and that `init` does not drop."""
    modules = tuple(f"{module}/" for module in model.head_modules)
    chosen = _matched(init, sorted(loaded.keys() | fresh.keys()))
    return [
        name
        for name in sorted(loaded.keys() & fresh.keys())
        if name.startswith(modules)
        and name not in chosen
        and loaded[name].shape == fresh[name].shape
    ]


def _matched(init: Init, names: Sequence[str]) -> set[str]:
    rules = [(init.drop, True)] if init.drop else []
    matched = trees.match(rules, names, default=False, what="init.drop")
    return {name for name, value in matched.items() if value}


def same_classes(
    theirs: tuple[str, ...] | None,
    ours: tuple[str, ...],
    init: Init,
    kept: Sequence[str],
    log: Callable[[str], None],
) -> bool:
    """Returns whether a kept head has the classes of the data, `ours`, in their order.

    Raises:
        ValueError: the head is kept on purpose, but nothing says that.
    """
    if theirs is None or theirs == ours:
        return True
    asked = init.match_classes == MatchClasses.IN_ORDER
    if not ours or not kept or (init.drop is None and not asked):
        return False
    option = "--config.init.match_classes"
    table = class_table(
        ours,
        theirs,
        name="the data",
        ours_is=f"the head in {init.path}",
        match=init.match_classes,
        option=option,
    )
    if not table.is_identity:
        raise ValueError(
            f"The head in {init.path} has the classes of the data in another order "
            f"({some(theirs)}; here {some(ours)}), and init.drop={init.drop!r} keeps "
            "it. Pin the order in the data (classes=...), or drop the head: leave out "
            "init.drop."
        )
    log(f"init: {table.message}")
    return True


def dropped(
    loaded: Mapping[str, Any],
    fresh: Mapping[str, Any],
    init: Init,
    model: Family,
    have_same_classes: bool,
    log: Callable[[str], None],
) -> set[str]:
    """Returns the names, of either side, that start from scratch; logs them."""
    names = sorted(loaded.keys() | fresh.keys())
    if init.drop is not None:
        chosen = _matched(init, names)
        for name in sorted(chosen):
            log(f"init: {name} starts from scratch (init.drop)")
        return chosen
    modules = tuple(f"{module}/" for module in model.head_modules)
    head = {name for name in names if name.startswith(modules)}
    fits = all(
        name in loaded and name in fresh and loaded[name].shape == fresh[name].shape
        for name in head
    )
    if not head or (fits and have_same_classes):
        return set()
    kernel = f"{model.head_modules[0]}/kernel"
    count = {
        what: leaves[kernel].shape[-1] if kernel in leaves else "no"
        for what, leaves in (("loaded", loaded), ("fresh", fresh))
    }
    if count["fresh"] == "no":
        log(f"Head has {count['loaded']} classes, the model no head: left out.")
        return head
    other, hint = "", ""
    if count["loaded"] == count["fresh"]:
        other = " with other names"
        hint = (
            ". To keep it, where they are the same in the same order: "
            "--config.init.match_classes=in_order"
        )
    log(
        f"Head has {count['loaded']} classes, data {count['fresh']}{other}: new head "
        f'(zero init). To refuse instead: --config.init.drop=""{hint}'
    )
    return head
