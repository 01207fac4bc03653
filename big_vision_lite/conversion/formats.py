"""What a format is, and the list of all: the files of this folder that define some."""

import dataclasses
import enum
import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_lite import trees
from big_vision_lite.conversion import engine, families
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.trees import STATISTICS as STATISTICS
from big_vision_lite.types import Model


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
class Weights:
    """What a file or folder of another library holds, before it is understood.

    `arrays` as stored, without the wrappers that checkpoints of training scripts add.
    `config` and `preprocessor` are the config.json and preprocessor_config.json beside
    them, {} where there are none. `path` is what messages name.
    """

    arrays: Mapping[str, np.ndarray]
    path: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Returns the shape of an array that a model cannot be without.

        Raises:
            ValueError: it is missing, empty or has another number of axes; names it.
        """
        array = self.arrays.get(name)
        if array is not None and array.ndim == axes and array.size:
            return array.shape
        line = f"  + {name}  only in the model"
        if array is not None:
            line = f"  - {name} {trees.describe(array)}  must have {axes} axes"
            line += "" if array.size else " and cannot be empty"
        raise ValueError(engine.report(self.path, [line]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model that some weights belong to.

    `image_size` is (height, width) in px where the weights fix it, else None;
    `channels` those of the image. `notes` are assumptions that shapes and names alone
    could not settle, said to the user.
    """

    model: Any
    image_size: tuple[int, int] | None = None
    channels: int = 3
    notes: tuple[str, ...] = ()


@runtime_checkable
class Format(Protocol):
    """One family of models in the names of one library.

    `name` is what messages call it ("timm ViT"), `model` our class, `ignored` patterns
    of their names that carry nothing.
    """

    name: str
    library: Library
    model: type
    ignored: tuple[str, ...]

    def recognises(self, weights: Weights) -> bool:
        """Says, by names and shapes, whether the weights are in this format."""
        ...

    def architecture(self, weights: Weights) -> Architecture:
        """Works out the model; ValueError says what is not supported and why."""
        ...

    def entries(self, model: Any, image_size: tuple[int, int]) -> Sequence[Entry]:
        """Returns the table of a model at an image size, for both directions."""
        ...

    def describe(self, model: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Returns what the other library needs to build the same model.

        timm: {"architecture": name, "model_args": {...}}; torchvision: {"builder":
        name, "arguments": {...}}; Hugging Face: the content of config.json;
        npz: {}. Raises ValueError with a sentence where there is no counterpart.
        """
        ...


@functools.cache
def all_formats() -> tuple[Format, ...]:
    """Returns the FORMATS of every file in families/, in the order of file names."""
    found: list[Format] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(families.__path__)):
        loaded = importlib.import_module(f"{families.__name__}.{module}")
        found += getattr(loaded, "FORMATS", ())
    return tuple(found)


def shapes(
    model: Model, image_size: tuple[int, int], channels: int
) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of parameters and "batch_stats/...", computing nothing."""
    image = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.uint8)
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
    image_size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Returns our {name: float32 array} of weights in a format.

    Raises:
        ValueError: names or shapes are not those of the format; lists them.
    """
    model = architecture.model
    # Optional: in some formats the same array has names that differ from file to file.
    normalised_names = getattr(form, "normalised_names", None)
    return engine.read(
        form.entries(model, image_size),
        (weights if normalised_names is None else normalised_names(weights)).arrays,
        shapes(model, image_size, architecture.channels),
        what=f"{weights.path} ({form.name})",
        ignored=form.ignored,
    )
