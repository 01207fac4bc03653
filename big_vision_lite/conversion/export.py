"""Exports a model of ours in the names, layout and files of another library."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from big_vision_lite.conversion import (
    foreign,
    formats,
    preprocessing_export,
    problem_type,
)
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.formats import Format, Library
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.conversion.preprocessing_export import Written
from big_vision_lite.recipes import serialize
from big_vision_lite.runtime import files
from big_vision_lite.types import Logits

WEIGHTS = {Library.NPZ: "model.npz"}
SAFETENSORS = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """The content of an export, before it is written.

    `arrays` {name: float32, or int64 for counters} and `entries`, the table of this
    model, are those of the format `form`; `described` is how the library builds the
    model (see Format.describe). `files` {name: text} lie beside the weights, `code` are
    lines that use them, `notes` say what the library computes otherwise.
    """

    library: Library
    form: Format
    arrays: Mapping[str, np.ndarray]
    entries: Sequence[Entry]
    described: Mapping[str, Any]
    files: Mapping[str, str]
    code: Sequence[str]
    notes: Sequence[str]


def export(
    model: Any,
    variables: Mapping[str, np.ndarray],
    preprocessing: Preprocessing,
    channels: int,
    class_names: Sequence[str],
    logits: Logits | None,
    library: Library,
    folder: str,
) -> Exported:
    """Returns `model` with `variables` ("batch_stats/..." included) for `library`.

    `logits` is what they mean, None without a head. `folder` is where the export will
    lie, for the lines of code.

    Raises:
        ValueError: the library has no counterpart of the model or its preprocessing, or
            a weight is not finite; says what to do.
    """
    for name, array in variables.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} holds NaN or infinity. Export an earlier step: "
                "RUN/checkpoints/STEP."
            )
    size = preprocessing.image_size_px
    form = find(model, library, size, channels)
    described = form.describe(model, size, channels)
    leaves = {name: array.shape for name, array in variables.items()}
    images = _images(library, preprocessing, channels)
    meaning = problem_type.write(logits, library)
    code = _code(library, described, images.config, folder)
    if logits is not None:
        code += [f"# Of the logits take{problem_type.IN_TORCH[logits]}."]
    return Exported(
        library=library,
        form=form,
        arrays=formats.write(form, model, size, variables),
        entries=form.entries(model, size, leaves),
        described=described,
        files=_files(
            library,
            {**described, **meaning},
            images.config,
            preprocessing,
            channels,
            class_names,
        ),
        code=code,
        notes=images.inexact,
    )


def _images(library: Library, preprocessing: Preprocessing, channels: int) -> Written:
    match library:
        case Library.HUGGINGFACE:
            return preprocessing_export.to_huggingface(preprocessing, channels)
        case Library.TIMM:
            return preprocessing_export.to_timm(preprocessing, channels)
        case Library.TORCHVISION:
            preset = preprocessing_export.to_torchvision(preprocessing)
            # torchvision reads no configuration; timm's form lets us read it back.
            back = preprocessing_export.to_timm(preprocessing, channels)
            return Written(
                config={"transforms": preset.config, "pretrained_cfg": back.config},
                inexact=preset.inexact,
            )
        case _:
            # Only this package reads it, so it holds our own ops.
            own = json.loads(serialize.to_json(preprocessing))["config"]
            return Written(config={foreign.PREPROCESSING: own}, inexact=())


def find(
    model: Any, library: Library, image_size_px: tuple[int, int], channels: int = 3
) -> Format:
    """Returns the format of a model in a library.

    Raises:
        ValueError: the library has none for this model; says why, and which have.
    """
    fitting = [form for form in FORMATS if isinstance(model, form.model)]
    reasons = []
    for form in fitting:
        if form.library == library:
            reason = form.refusal(model, image_size_px, channels)
            if reason is None:
                return form
            reasons.append(reason)
    others = {
        form.library: f"--to {form.library}"
        for form in fitting
        if form.library != library
        and form.refusal(model, image_size_px, channels) is None
    }
    ways = " or ".join(others[each] for each in Library if each in others)
    if not reasons:
        name = type(model).__name__
        raise ValueError(
            f"{library} has no counterpart of {name}. Export it with {ways}."
        )
    reason = min(reasons, key=lambda reason: reason.distance)
    only = "As no other library has it, export it" if len(others) == 1 else "Export it"
    raise ValueError(f"{reason.sentence} {only} with {ways}.")


def write(exported: Exported, folder: pathlib.Path) -> None:
    """Writes weights and files into `folder`, all of them or nothing.

    Raises:
        ValueError: the folder is not empty.
    """
    files.check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if exported.library == Library.NPZ:
        # Any: by numpy's signature the names could be its own arguments.
        save: Any = np.savez
        save(unfinished / WEIGHTS[Library.NPZ], **exported.arrays)
    else:
        safetensors.numpy.save_file(
            dict(exported.arrays), unfinished / SAFETENSORS, metadata={"format": "pt"}
        )
    for name, text in exported.files.items():
        (unfinished / name).write_text(text)
    (unfinished / "use.py").write_text("\n".join(exported.code) + "\n")
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _files(
    library: Library,
    described: Mapping[str, Any],
    images: Mapping[str, Any],
    preprocessing: Preprocessing,
    channels: int,
    class_names: Sequence[str],
) -> dict[str, str]:
    """Returns {name: text} of the files beside the weights."""
    labels = {"label_names": list(class_names)} if class_names else {}
    match library:
        case Library.TORCHVISION:
            config = {**described, **images, **labels}
        case Library.TIMM:
            arguments = described["model_args"]
            count = {"num_classes": arguments.get("num_classes", 0)}
            config = {**described, **count, "pretrained_cfg": dict(images), **labels}
        case Library.HUGGINGFACE:
            names = dict(enumerate(class_names))
            labels = {
                "id2label": {str(index): name for index, name in names.items()},
                "label2id": {name: index for index, name in names.items()},
            }
            config = {**described, **(labels if class_names else {})}
            processor = _json(images)
            return {
                "config.json": _json(config),
                "preprocessor_config.json": processor,
            }
        case _:
            shape = {
                "image_size": list(preprocessing.image_size_px),
                "channels": channels,
            }
            config = {**described, **shape, **images, **labels}
    return {"config.json": _json(config)}


def _code(
    library: Library,
    described: Mapping[str, Any],
    images: Mapping[str, Any],
    folder: str,
) -> list[str]:
    match library:
        case Library.TIMM:
            return [
                "import timm",
                f"model = timm.create_model('local-dir:{folder}', pretrained=True)",
                "model = model.eval()",
                "config = timm.data.resolve_model_data_config(model)",
                "transform = timm.data.create_transform(**config)",
            ]
        case Library.HUGGINGFACE:
            kind = described["architectures"][0]
            return [
                f"from transformers import AutoImageProcessor, {kind}",
                f"model = {kind}.from_pretrained({folder!r}).eval()",
                f"processor = AutoImageProcessor.from_pretrained({folder!r})",
                "inputs = processor(image, return_tensors='pt')  # image: PIL, RGB",
                "outputs = model(**inputs)",
            ]
        case Library.TORCHVISION:
            return [
                "import torchvision",
                "from safetensors.torch import load_file",
                f"model = torchvision.models.{described['builder']}("
                f"**{described['arguments']!r})",
                f"model.load_state_dict(load_file({folder + '/' + SAFETENSORS!r}))",
                "model = model.eval()",
                "from torchvision.transforms import InterpolationMode, _presets",
                "transform = _presets.ImageClassification("
                + ", ".join(
                    f"{name}={_mode(value) if name == 'interpolation' else repr(value)}"
                    for name, value in images["transforms"].items()
                )
                + ")",
            ]
        case Library.SAFETENSORS:
            return [
                _FOR_TORCH.format(folder),
                f"# python -m big_vision_lite.evaluate --workdir {folder} ...",
            ]
        case _:
            return [
                _FOR_TORCH.format(folder),
                "import numpy",
                f"arrays = numpy.load({folder + '/' + WEIGHTS[Library.NPZ]!r})",
                "for name in sorted(arrays.files):",
                "    print(name, arrays[name].shape)",
            ]


def _mode(name: str) -> str:
    return f"InterpolationMode({name!r})"


_FOR_TORCH = (
    "# This is JAX weights. For PyTorch: "
    "python tools/convert_checkpoint.py {} --to timm --out FOLDER"
)
