"""Defines a format: one family of models in the names and layout of one library."""

import abc
import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_lite import trees
from big_vision_lite.conversion import engine, preprocessing, tables
from big_vision_lite.conversion.assumption import Assumption
from big_vision_lite.conversion.engine import Entry, Shape
from big_vision_lite.conversion.preprocessing import Assumed
from big_vision_lite.conversion.tables import Dialect, Rows
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.types import Logits, Model

Leaves = Mapping[str, Shape]
# (height, width) in px.
Size = tuple[int, int]


class Library(enum.StrEnum):
    """The library that reads the names and layouts of a format."""

    TIMM = "timm"
    TORCHVISION = "torchvision"
    HUGGINGFACE = "huggingface"
    # npz archives: big_vision, vision_transformer, the first BiT.
    NPZ = "npz"
    # Our own names in one file.
    SAFETENSORS = "safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model that some weights belong to.

    `image_size_px` is (height, width) where the weights fix it, else None; `channels`
    is that of the image. `logits` is set where the format says what they mean.
    `assumptions` are what shapes and names do not show.
    """

    model: Any
    image_size_px: Size | None = None
    channels: int = 3
    logits: Logits | None = None
    assumptions: tuple[Assumption, ...] = ()


class Format(abc.ABC):
    """One family of models in the names of one library; subclasses are the formats.

    `signs` are names that every file of this format has, `strangers` names that none
    has. `table` holds the names of modules in the library's `dialect`; `ignored` are
    patterns of names that no model needs. `requires` holds the values that fields of
    our model must have, {"head.hidden_dim": None}: one value, a list of allowed ones,
    or a class. `hints` {field: sentence} say what to do about another value.
    """

    # The name in messages: "timm ViT".
    name: str
    library: Library
    model: type
    dialect: Dialect = tables.TORCH
    table: Rows = {}
    # For weights without preprocessing.
    assumes: Assumed = preprocessing.OF_TRANSFORMERS
    signs: Sequence[str] = ()
    strangers: Sequence[str] = ()
    ignored: Sequence[str] = ()
    requires: Mapping[str, Any] = {}
    hints: Mapping[str, str] = {
        "head.hidden_dim": "To leave that layer behind, train a new head: "
        "--config.init.drop='head/.*' with head.hidden_dim=none.",
    }

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the weights with one spelling for names that have several."""
        return weights

    def recognises(self, weights: Weights) -> bool:
        """Returns whether the weights are in this format, by names, shapes, config."""
        names = self.normalised_names(weights).arrays.keys()
        return set(self.signs) <= names and not names & set(self.strangers)

    @abc.abstractmethod
    def architecture(self, weights: Weights) -> Architecture:
        """Returns the model of the weights.

        Raises:
            ValueError: it is not supported; says what and why.
        """

    def rows(self, model: Any) -> Rows:
        """Returns the table for a model; overridden where it depends on the model."""
        return self.table

    def special(self, model: Any, size: Size) -> Sequence[Entry]:
        """Returns entries for arrays that no row can tie; `rows` tie the rest."""
        return ()

    def constants(self, model: Any) -> dict[str, np.ndarray]:
        """Returns their {name: array} that correspond to nothing of ours."""
        return {}

    def describe(self, model: Any, size: Size, channels: int) -> dict[str, Any]:
        """Returns what the other library needs to build the same model.

        timm: {"architecture": name, "model_args": {...}}; torchvision: {"builder":
        name, "arguments": {...}}; Hugging Face: the content of config.json; npz: {};
        safetensors: our JSON of the model.

        Raises:
            ValueError: the library has no counterpart; says why in a sentence.
        """
        return {}

    def entries(self, model: Any, size: Size, leaves: Leaves) -> list[Entry]:
        """Returns the entries that tie all `leaves` {name: shape} of a model."""
        special = list(self.special(model, size))
        tied = {name for entry in special for name in entry.ours}
        rest = {name: shape for name, shape in leaves.items() if name not in tied}
        plain = tables.entries(self.rows(model), self.dialect, rest, self.name)
        return [*special, *plain]

    def refusal(self, model: Any, size: Size, channels: int) -> "Refusal | None":
        """Returns why a model has no counterpart in this format, None if it has one."""
        found = {name: _value(model, name) for name in self.requires}
        wrong = [
            n for n, wanted in self.requires.items() if not _fits(found[n], wanted)
        ]
        if wrong:
            there = " and ".join(f"{n}={_words(self.requires[n])}" for n in wrong)
            here = " and ".join(f"{name}={_words(found[name])}" for name in wrong)
            hints = [self.hints[name] for name in wrong if name in self.hints]
            why = f"{self.name} has {there}, this model {here}."
            # A missing or different part weighs more than any number.
            parts = [
                n for n in wrong if _is_part(found[n]) or _is_part(self.requires[n])
            ]
            distance = len(wrong) + 10 * len(parts)
            return Refusal(" ".join([why, *dict.fromkeys(hints)]), distance)
        try:
            self.describe(model, size, channels)
        except ValueError as error:
            return Refusal(str(error), 0)
        return None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a model has no counterpart; messages have that of the least `distance`."""

    sentence: str
    distance: int


@functools.lru_cache(maxsize=4)
def shapes(model: Model, image_size_px: Size, channels: int) -> Mapping[str, Shape]:
    """Returns {name: shape} of parameters and "batch_stats/..."; computes no value."""
    image = jax.ShapeDtypeStruct((1, *image_size_px, channels), jnp.uint8)
    variables = dict(
        jax.eval_shape(
            lambda key, image: model.init(key, **model.inputs({"image": image})),
            jax.random.key(0),
            image,
        )
    )
    named = trees.flatten(variables.pop("params")) | trees.flatten(variables)
    return {name: tuple(leaf.shape) for name, leaf in named.items()}


def load(
    weights: Weights,
    form: Format,
    architecture: Architecture,
    image_size_px: Size,
) -> dict[str, np.ndarray]:
    """Returns our {name: float32 array} of weights in a format.

    Raises:
        ValueError: names or shapes are not those of the format, or a value is not
            finite; lists them.
    """
    model = architecture.model
    leaves = shapes(model, image_size_px, architecture.channels)
    return engine.read(
        form.entries(model, image_size_px, leaves),
        form.normalised_names(weights).arrays,
        leaves,
        what=f"{weights.path} ({form.name})",
        ignored=(*form.ignored, *form.dialect.ignored),
    )


def write(
    form: Format,
    model: Any,
    image_size_px: Size,
    variables: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Returns {name: array} in the names and layout of a format, complete for it."""
    leaves = {name: array.shape for name, array in variables.items()}
    theirs = engine.write(form.entries(model, image_size_px, leaves), variables)
    return theirs | form.dialect.counters(list(theirs)) | form.constants(model)


def _value(model: Any, path: str) -> Any:
    """Returns a field such as "head.hidden_dim", None where there is no head."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(value, wanted)
    return value in wanted if isinstance(wanted, list) else value == wanted


def _is_part(value: Any) -> bool:
    return isinstance(value, type) or dataclasses.is_dataclass(value)


def _words(value: Any) -> str:
    """Returns a value as flags write it, a module by the name of its class."""
    if isinstance(value, list):
        return " or ".join(map(_words, value))
    if _is_part(value):
        return (value if isinstance(value, type) else type(value)).__name__
    return "none" if value is None else str(value)
