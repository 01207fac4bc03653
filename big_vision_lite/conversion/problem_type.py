"""The meaning of logits in config.json, by Hugging Face's key "problem_type"."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from big_vision_lite.conversion.assumption import About, Assumption
from big_vision_lite.conversion.formats import Library
from big_vision_lite.types import Logits

KEY = "problem_type"
NAMES = {
    Logits.SOFTMAX: "single_label_classification",
    Logits.SIGMOID: "multi_label_classification",
    Logits.NONE: "regression",
}
# How a line of torch makes of logits what they mean.
IN_TORCH = {
    Logits.SOFTMAX: ".softmax(-1): one class an image",
    Logits.SIGMOID: ".sigmoid(): each class by itself, several an image",
    Logits.NONE: " as they are: numbers, no classes",
}


class Meaning(NamedTuple):
    """What logits mean, and what is to be said where the file does not say it."""

    logits: Logits
    assumptions: tuple[Assumption, ...] = ()


def read(config: Mapping[str, Any], num_outputs: int, path: str) -> Meaning:
    """Returns what the logits of weights mean; `config` is the file beside them.

    Raises:
        ValueError: it names a meaning that is not known here, or cannot be.
    """
    named = config.get(KEY)
    known = {name: logits for logits, name in NAMES.items()}
    if named is None:
        return _assumed(num_outputs)
    if named not in known:
        raise ValueError(
            f'{path}: {KEY} "{named}" in config.json is not read here; '
            f"{', '.join(known)} are."
        )
    if known[named] == Logits.SOFTMAX and num_outputs == 1:
        raise ValueError(
            f'{path}: {KEY} "{named}" with one class, whose probability is always 1. '
            f'Write {KEY} "{NAMES[Logits.SIGMOID]}" into config.json for yes or no, '
            f'"{NAMES[Logits.NONE]}" for a number.'
        )
    return Meaning(known[named])


def _assumed(num_outputs: int) -> Meaning:
    # What Hugging Face trains where nothing is said.
    logits = Logits.NONE if num_outputs == 1 else Logits.SOFTMAX
    others = [name for other, name in NAMES.items() if other != logits]
    if num_outputs == 1:
        others = [NAMES[Logits.SIGMOID]]
    what = "one output is a number" if num_outputs == 1 else "one class an image"
    choices = " or ".join(f'"{name}"' for name in others)
    words = (
        f"{logits} assumed ({what}): nothing says it. If not: a config.json beside the "
        f'weights with "{KEY}": {choices}'
    )
    return Meaning(logits, (Assumption(About.LOGITS, words),))


def write(logits: Logits | None, library: Library) -> dict[str, Any]:
    """Returns what config.json says about logits; nothing without a head (None).

    Raises:
        ValueError: the library has no word for it, and would read them otherwise.
    """
    if logits is None:
        return {}
    if library == Library.TORCHVISION and logits != Logits.SOFTMAX:
        raise ValueError(
            f"The logits of this model mean {logits} ({NAMES[logits]}), but all "
            "classifiers of torchvision mean softmax, and none of its files can say "
            "otherwise. Export it with --to timm or --to huggingface."
        )
    return {KEY: NAMES[logits]}
