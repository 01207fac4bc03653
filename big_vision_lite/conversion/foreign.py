"""Loads a model of another library: recognises its format and converts it to ours."""

import dataclasses
import json
from typing import Any

import numpy as np

from big_vision_lite import __version__
from big_vision_lite.conversion import files, formats, preprocessing
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.formats import Format
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.recipes import serialize
from big_vision_lite.types import Op

# The key of the preprocessing in config.json of our exports.
PREPROCESSING = "preprocessing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model read from a weight file.

    `variables` are our {name: float32 array}, batch statistics as "batch_stats/...".
    `model` has the scaling of pixels (mean, std) that the weights were trained with;
    `preprocess` makes its input, of `image_size_px` (height, width), from a file.
    `class_names` are empty when the file does not name them. `format` is the name of
    the recognised format; `notes` are assumptions to tell the user.
    """

    path: str
    format: str
    model: Any
    variables: dict[str, np.ndarray]
    image_size_px: tuple[int, int]
    channels: int
    preprocess: tuple[Op, ...]
    class_names: tuple[str, ...]
    licence: str | None
    notes: tuple[str, ...]

    @property
    def origin(self) -> dict[str, Any]:
        """Returns the origin of the weights, for manifests."""
        return {"path": self.path, "format": self.format, "licence": self.licence}


def load(path: str) -> Foreign:
    """Reads and converts a weight file, a folder that holds one, or `hub:org/name`.

    Raises:
        FileNotFoundError: there is nothing of that name, or no weights in the folder.
        ValueError: it is no weight file, is damaged, is in no known format, or does not
            fit its format; lists names with "+" and "-".
    """
    found = files.read(path)
    form = recognise(found)
    architecture = form.architecture(found)
    channels = architecture.channels
    steps = _own_preprocessing(found)
    if steps is None:
        steps = preprocessing.read(
            found, form.assumes, architecture.image_size_px, channels
        )
    height, width = steps.image_size_px
    variables = formats.load(found, form, architecture, (height, width))
    model = architecture.model.clone(mean=tuple(steps.mean), std=tuple(steps.std))
    return Foreign(
        path=path,
        format=form.name,
        model=model,
        variables=variables,
        image_size_px=(height, width),
        channels=channels,
        preprocess=steps.ops,
        class_names=_class_names(found, variables),
        licence=found.config.get("license"),
        notes=(*architecture.notes, *steps.notes),
    )


def recognise(found: Weights) -> Format:
    """Returns the first format that recognises the weights.

    Raises:
        ValueError: none does; quotes some of the names.
    """
    for form in FORMATS:
        if form.recognises(found):
            return form
    names = list(found.arrays)
    known = ", ".join(sorted({form.name for form in FORMATS}))
    raise ValueError(
        f"{found.path} holds {len(names)} arrays ({', '.join(names[:4])}, ...), the "
        f"names of no model that is known here. Known are: {known}."
    )


def _own_preprocessing(found: Weights) -> Preprocessing | None:
    """Returns the preprocessing in config.json of our own exports, None elsewhere."""
    document = found.config.get(PREPROCESSING)
    if document is None:
        return None
    text = json.dumps({"version": __version__, "config": document})
    return serialize.from_json(text)


def _class_names(found: Weights, variables: dict[str, np.ndarray]) -> tuple[str, ...]:
    if "head/kernel" not in variables:
        return ()
    count = variables["head/kernel"].shape[-1]
    config = found.config
    labels = config.get("id2label")
    if isinstance(labels, dict) and len(labels) == count:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == count:
        described = config.get("label_descriptions", {})
        return tuple(str(described.get(name, name)) for name in names)
    return ()
