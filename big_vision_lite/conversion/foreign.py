"""Loads a model of another library: recognises its format and converts it to ours."""

import dataclasses
import json
from typing import Any

import numpy as np

from big_vision_lite import __version__
from big_vision_lite.conversion import (
    assumption,
    files,
    formats,
    preprocessing,
    problem_type,
)
from big_vision_lite.conversion.assumption import About, Assumption
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.formats import Architecture, Format
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.conversion.problem_type import Meaning
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.recipes import serialize
from big_vision_lite.types import Logits, Op, backbone_of

# The key of the preprocessing in config.json of our exports.
PREPROCESSING = "preprocessing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model read from a weight file.

    `variables` are our {name: float32 array}, batch statistics as "batch_stats/...".
    `model` has the scaling of pixels (mean, std) that the weights were trained with;
    `preprocess` makes its input, of `image_size_px` (height, width), from a file.
    `class_names` are empty when the file does not name them; `logits` is what they
    mean, None without a head. `format` is the name of the recognised format, `part` the
    part of the file that was asked for, "" where it has none of that name;
    `assumptions` are to be told to the user.
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
    logits: Logits | None
    part: str
    assumptions: tuple[Assumption, ...]

    @property
    def origin(self) -> dict[str, Any]:
        """Returns the origin of the weights, for manifests."""
        return {
            "path": self.path,
            "format": self.format,
            "licence": self.licence,
            **({"part": self.part} if self.part else {}),
            "assumptions": assumption.to_record(self.assumptions),
        }


def load(path: str, part: str = "") -> Foreign:
    """Reads and converts a weight file, a folder that holds one, or `hub:org/name`.

    Of a file with several models `part` is the beginning of the names of one.

    Raises:
        FileNotFoundError: there is nothing of that name, or no weights in the folder.
        ValueError: it is no weight file, is damaged, is in no known format, or does not
            fit its format; lists names with "+" and "-".
    """
    found = files.read(path, part)
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
    logits = _meaning(found, architecture, variables)
    class_names = _class_names(found, variables)
    model = scaled(architecture.model, tuple(steps.mean), tuple(steps.std))
    return Foreign(
        path=path,
        format=form.name,
        model=model,
        variables=variables,
        image_size_px=(height, width),
        channels=channels,
        preprocess=steps.ops,
        class_names=class_names,
        licence=found.config.get("license"),
        logits=None if logits is None else logits.logits,
        part=found.part,
        assumptions=(
            *found.assumptions,
            *architecture.assumptions,
            *steps.assumptions,
            *(() if logits is None else logits.assumptions),
            *(() if logits is None or class_names else _NAMELESS),
        ),
    )


def scaled(model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Returns the model with the scaling of pixels in its backbone."""
    if not model.backbone:
        return model.clone(mean=mean, std=std)
    inner = scaled(getattr(model, model.backbone), mean, std)
    return model.clone(**{model.backbone: inner})


def check_scaling(found: Foreign) -> None:
    """Raises ValueError where no image can have the mean and std that came along.

    Weights that only start a run are not asked: its recipe has its own.
    """
    for name in ("mean", "std"):
        model = backbone_of(found.model)[1]
        count, channels = len(getattr(model, name)), found.channels
        if count not in (1, channels):
            raise ValueError(
                f"{found.path}: its {name} has {count} values, its images {channels} "
                f"channels. Write 1 value or {channels} of mean and std beside the "
                "weights, into preprocessor_config.json or the pretrained_cfg of "
                "config.json."
            )


# What is to be said of a head without names.
_NAMELESS = (
    Assumption(
        About.CLASSES,
        "no names come with the weights: they are class_0, class_1, ... in their order",
    ),
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


def _meaning(
    found: Weights, architecture: Architecture, variables: dict[str, np.ndarray]
) -> Meaning | None:
    if "head/kernel" not in variables:
        return None
    if architecture.logits is not None:
        return Meaning(architecture.logits)
    count = variables["head/kernel"].shape[-1]
    return problem_type.read(found.config, count, found.path)


def _class_names(found: Weights, variables: dict[str, np.ndarray]) -> tuple[str, ...]:
    if "head/kernel" not in variables:
        return ()
    count = variables["head/kernel"].shape[-1]
    config = found.config
    labels = config.get("id2label")
    if isinstance(labels, dict) and len(labels) == count:
        given = tuple(str(labels[key]) for key in sorted(labels, key=int))
        # Hugging Face writes these where it knows none.
        return () if given == tuple(f"LABEL_{i}" for i in range(count)) else given
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == count:
        described = config.get("label_descriptions", {})
        return tuple(str(described.get(name, name)) for name in names)
    return ()
