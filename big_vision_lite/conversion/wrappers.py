"""What training scripts put around the arrays of a model, and what lies beside it."""

import os
import re
from collections.abc import Iterable

import numpy as np

from big_vision_lite.conversion.formats import Weights, all_formats

# What training scripts wrap parameters in; averages first, as timm's loader does.
AVERAGES = ("state_dict_ema", "model_ema")
WRAPPERS = (
    *(*AVERAGES, "state_dict", "model", "module", "_orig_mod"),
    *("params", "opt/target", "opt.target"),
)
# How names began before wrappers were taken off, and the arrays without them.
Inside = tuple[str, dict[str, np.ndarray]]


def unwrapped(arrays: dict[str, np.ndarray], path: str, taken: str = "") -> Inside:
    """Returns what was taken off the front of the names, and the arrays of the model.

    What lies beside the model is dropped. `path` names the file in messages.
    """
    if _of_a_model(arrays, path):
        return taken, arrays
    found: list[Inside] = []
    for prefix in (wrapper + end for wrapper in WRAPPERS for end in "/."):
        names = [name for name in arrays if name.startswith(prefix)]
        inside = {name.removeprefix(prefix): arrays[name] for name in names}
        found += [unwrapped(inside, path, taken + prefix)] if inside else []
    known = [inner for inner in found if _of_a_model(inner[1], path)]
    return [*known, *found, (taken, arrays)][0]


def beside(names: Iterable[str], prefix: str) -> list[str]:
    """Returns what lies beside the prefix, each branch by one name."""
    shared = {name: len(os.path.commonprefix([name, prefix])) for name in names}
    others = {name: count for name, count in shared.items() if count < len(prefix)}
    tops = [name[:n] + re.split("[./]", name[n:])[0] for name, n in others.items()]
    return list(dict.fromkeys(tops))


def _of_a_model(arrays: dict[str, np.ndarray], path: str) -> bool:
    found = Weights(arrays=arrays, path=path)
    return any(form.recognises(found) for form in all_formats())
