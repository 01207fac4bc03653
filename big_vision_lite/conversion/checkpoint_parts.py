"""The models inside a checkpoint: wrappers, teachers and queries, what lies beside."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from big_vision_lite.conversion.assumption import About, Assumption
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.formats import Format, Library
from big_vision_lite.conversion.weights import Weights

Arrays = Mapping[str, np.ndarray]

# Of several models these are taken, as the programs that wrote them do. Averages:
# timm's and torchvision's loaders. Queries: main_lincls.py of MoCo and of MoCo v3.
AVERAGES = ("state_dict_ema", "model_ema", "ema_model")
QUERIES = ("encoder_q", "base_encoder")
KEYS = ("encoder_k", "momentum_encoder")
# Moments of optimizers have the names of the parameters, but are no model.
MOMENTS = re.compile(r"opt_state|optim(izer)?s?(_states?)?|mu|nu|exp_avg(_sq)?|trace")
# What pretraining puts beside a backbone under no name of its own: decoders (MAE),
# predictors and projections (BYOL, SimSiam, SwAV, JEPA), heads of several layers.
PRETRAINING = re.compile(
    r"(decoder\w*|predictor|projector|projection_head|prototypes|queue\w*)([./].*)?"
    r"|(head|fc)\.\d+\..*|head\.(mlp|last_layer)\..*"
)
# A contrastive encoder ends in a projection, which has the name of a classifier.
PROJECTION = re.compile(r"(fc|head)[./].*")


class Taken(NamedTuple):
    """The `arrays` of a model by the names of its format, and what is to be said.

    `part` is the part of the file that was asked for, "" if it has no such part.
    """

    arrays: Arrays
    part: str
    assumptions: tuple[Assumption, ...]


def take(arrays: Arrays, path: str, config: Mapping[str, Any], part: str = "") -> Taken:
    """Returns the model among the arrays of a file: all, or what a prefix makes one.

    A `part` is a beginning of names ("teacher") that holds one model.

    Raises:
        ValueError: there are several models and no part says which; lists them.
    """
    if part and not _below(arrays, part):
        part = ""
    form = _format(Weights(arrays=arrays, path=path, config=config))
    if form is not None and not part:
        # Our own files say all themselves.
        if form.library == Library.SAFETENSORS:
            return Taken(arrays, "", ())
        return _without_pretraining(arrays, "", arrays, [])
    models = _models(arrays, path)
    choices = [p for p in models if not part or f"{p[:-1]}.".startswith(f"{part}.")]
    if not models and not part:
        return Taken(arrays, "", ())
    prefix = _choice(choices, list(models), part, path)
    found = _without_pretraining(models[prefix], prefix, arrays, list(models))
    return found._replace(part=part)


def _choice(choices: list[str], models: list[str], part: str, path: str) -> str:
    """Returns the prefix of the one model, or of that which others take by default."""
    for preferred in ((), AVERAGES, QUERIES):
        fitting = [p for p in choices if not preferred or _within(p, preferred)]
        if len(fitting) == 1:
            return fitting[0]
    if part and not choices:
        there = _listed(models) or "none"
        raise ValueError(
            f'{path} has no model that is known here in "{part}"; '
            f"models in it: {there}."
        )
    shown = choices or models
    parts = " or ".join(prefix[:-1] for prefix in shown)
    raise ValueError(
        f"{path} holds {len(shown)} models: {parts}. Type which: "
        f"--config.init.part={shown[0][:-1]} in a recipe, --part {shown[0][:-1]} in "
        "evaluate, predict and the tools, part= in Python."
    )


def _without_pretraining(
    inside: Arrays, prefix: str, whole: Arrays, models: list[str]
) -> Taken:
    """Returns a model without decoders and the like; says what was left behind."""
    contrastive = _within(prefix, (*QUERIES, *KEYS))
    dropped = {
        name
        for name in inside
        if PRETRAINING.fullmatch(name) or (contrastive and PROJECTION.fullmatch(name))
    }
    left = beside(whole, prefix) + list(
        dict.fromkeys(prefix + re.split("[./]", name)[0] for name in sorted(dropped))
    )
    kept = {name: array for name, array in inside.items() if name not in dropped}
    if not left:
        return Taken(kept, "", ())
    words = f"took {prefix[:-1] or 'the model'}"
    if _within(prefix, AVERAGES):
        words += ", the average"
    elif _within(prefix, QUERIES):
        words += ", the query encoder"
    words += f"; left: {', '.join(left)}."
    if others := [other[:-1] for other in models if other != prefix]:
        words += (
            f" For {others[0]}: --config.init.part={others[0]} in a recipe, --part "
            f"{others[0]} elsewhere."
        )
    return Taken(kept, "", (Assumption(About.PART, words),))


def beside(names: Iterable[str], prefix: str) -> list[str]:
    """Returns what lies beside the prefix, each branch by one name."""
    shared = {name: len(os.path.commonprefix([name, prefix])) for name in names}
    others = {name: count for name, count in shared.items() if count < len(prefix)}
    tops = [name[:n] + re.split("[./]", name[n:])[0] for name, n in others.items()]
    return list(dict.fromkeys(tops))


def _models(arrays: Arrays, path: str) -> dict[str, Arrays]:
    """Returns {prefix: arrays} of the outermost branches that are models.

    Of branches with the same arrays the first counts.
    """
    found: dict[str, Arrays] = {}
    branches = _branches(arrays, "")
    while branches:
        prefix, inside = branches.pop(0)
        if _within(prefix, MOMENTS):
            continue
        if _format(Weights(arrays=inside, path=path)) is not None:
            if not any(_same(inside, other) for other in found.values()):
                found[prefix] = inside
        else:
            branches += _branches(inside, prefix)
    return found


def _branches(arrays: Arrays, prefix: str) -> list[tuple[str, Arrays]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if first := re.match(r"[^./]+[./]", name):
            found.setdefault(first[0], {})[name[first.end() :]] = array
    return [(prefix + first, inside) for first, inside in found.items()]


def _same(arrays: Arrays, others: Arrays) -> bool:
    return arrays.keys() == others.keys() and all(
        np.array_equal(array, others[name]) for name, array in arrays.items()
    )


def _format(weights: Weights) -> Format | None:
    return next((form for form in FORMATS if form.recognises(weights)), None)


def _within(prefix: str, names: "tuple[str, ...] | re.Pattern[str]") -> bool:
    parts = re.split("[./]", prefix)
    if isinstance(names, tuple):
        return any(part in names for part in parts)
    return any(names.fullmatch(part) for part in parts)


def _below(names: Iterable[str], part: str) -> list[str]:
    return [name for name in names if name.startswith((f"{part}.", f"{part}/"))]


def _listed(prefixes: Iterable[str]) -> str:
    return ", ".join(prefix[:-1] for prefix in prefixes)
