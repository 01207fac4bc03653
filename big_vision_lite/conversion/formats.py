"""Formats: one family of models in the names and layout of one library."""

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
    """Whose names and layouts."""

    TIMM = "timm"
    TORCHVISION = "torchvision"
    HUGGINGFACE = "huggingface"
    # Archives of numpy arrays: big_vision, vision_transformer, the first BiT.
    NPZ = "npz"
    # Our own names in one file.
    SAFETENSORS = "safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model that some weights belong to.

    `image_size_px` is (height, width) in px where the weights fix it, else None;
    `channels` those of the image. `logits` is set where the format says what they mean.
    `assumptions` are what names and shapes alone could not settle.
    """

    model: Any
    image_size_px: Size | None = None
    channels: int = 3
    logits: Logits | None = None
    assumptions: tuple[Assumption, ...] = ()


class Format(abc.ABC):
    """One family of models in the names of one library; a family inherits it.

    Of each file the names in `signs` are there and those in `strangers` are not.
    `table` holds the names of modules in the library's `dialect`, `ignored` patterns of
    names that carry nothing. `requires` says which values the fields of our model have
    there, {"head.hidden_dim": None}: one value, a list of some, or a class; `hints`
    {field: sentence} says what else to do about one.
    """

    # What messages call it: "timm ViT".
    name: str
    library: Library
    model: type
    dialect: Dialect = tables.TORCH
    table: Rows = {}
    # Where no preprocessing comes with the weights.
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
        """Returns the weights with names that are written in one way only."""
        return weights

    def recognises(self, weights: Weights) -> bool:
        """Says, by names and shapes, whether the weights are in this format."""
        names = self.normalised_names(weights).arrays.keys()
        return set(self.signs) <= names and not names & set(self.strangers)

    @abc.abstractmethod
    def architecture(self, weights: Weights) -> Architecture:
        """Works out the model; ValueError says what is not supported and why."""

    def rows(self, model: Any) -> Rows:
        """Returns the table for a model, where it depends on that."""
        return self.table

    def special(self, model: Any, size: Size) -> Sequence[Entry]:
        """Returns what ties several arrays at once; the rows tie the rest."""
        return ()

    def constants(self, model: Any) -> dict[str, np.ndarray]:
        """Returns arrays that they have and nothing of ours corresponds to."""
        return {}

    def describe(self, model: Any, size: Size, channels: int) -> dict[str, Any]:
        """Returns what the other library needs to build the same model.

        timm: {"architecture": name, "model_args": {...}}; torchvision: {"builder":
        name, "arguments": {...}}; Hugging Face: the content of config.json;
        npz: {}. Raises ValueError with a sentence where there is no counterpart.
        """
        return {}

    def entries(self, model: Any, size: Size, leaves: Leaves) -> list[Entry]:
        """Ties all `leaves` {name: shape} of a model at an image size, both ways."""
        special = list(self.special(model, size))
        tied = {name for entry in special for name in entry.ours}
        rest = {name: shape for name, shape in leaves.items() if name not in tied}
        plain = tables.entries(self.rows(model), self.dialect, rest, self.name)
        return [*special, *plain]

    def refusal(self, model: Any, size: Size, channels: int) -> "Refusal | None":
        """Returns why a model has no counterpart, None where it has one."""
        found = {name: _value(model, name) for name in self.requires}
        wrong = [
            n for n, wanted in self.requires.items() if not _fits(found[n], wanted)
        ]
        if wrong:
            there = " and ".join(f"{n}={_words(self.requires[n])}" for n in wrong)
            here = " and ".join(f"{name}={_words(found[name])}" for name in wrong)
            hints = [self.hints[name] for name in wrong if name in self.hints]
            why = f"{self.name} has {there}, this model {here}."
            # A part that is missing or another is further away than any number.
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
    """Why a model has no counterpart; of several formats the nearest one's is said."""

    sentence: str
    distance: int


@functools.lru_cache(maxsize=4)
def shapes(model: Model, image_size_px: Size, channels: int) -> Mapping[str, Shape]:
    """Returns {name: shape} of parameters and "batch_stats/...", computing nothing."""
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
        ValueError: names or shapes are not those of the format; lists them.
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
    """Returns our {name: array} in the names and layout of a format, all it has."""
    leaves = {name: array.shape for name, array in variables.items()}
    theirs = engine.write(form.entries(model, image_size_px, leaves), variables)
    return theirs | form.dialect.counters(list(theirs)) | form.constants(model)


def _value(model: Any, path: str) -> Any:
    """Returns the field "head.hidden_dim", None where there is no head."""
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
    """Writes a value as flags do; of a module its class."""
    if isinstance(value, list):
        return " or ".join(map(_words, value))
    if _is_part(value):
        return (value if isinstance(value, type) else type(value)).__name__
    return "none" if value is None else str(value)
