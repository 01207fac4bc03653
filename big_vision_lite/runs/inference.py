"""Runs a saved model on images: classes, probabilities and features."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from rich.console import Console
from rich.progress import track

from big_vision_lite.conversion.assumption import About, Assumption
from big_vision_lite.data import pipeline
from big_vision_lite.data.sources.files import Guarded
from big_vision_lite.runs import load as load_lib
from big_vision_lite.runs.saved_run import SavedRun
from big_vision_lite.training import step as step_lib
from big_vision_lite.types import (
    Array,
    Batch,
    Forward,
    Logits,
    Model,
    backbone_of,
)

# step(state, batch) -> {output: one row per image}.
Step = Callable[..., dict[str, Array]]


class LoadedModel:
    """A model with its preprocessing: uint8 images in, numpy arrays out.

    `images` is an array [N, H, W, C] of uint8 in 0..255, or a sequence of images of any
    size: such arrays [H, W, C] or [H, W], or the bytes of image files. They are
    preprocessed as in the run's evaluations, in batches of at most `batch_size`.
    `class_names` is () if the weights came without them. Averaged parameters (EMA) are
    used if the run has them. `run` holds the recipe, the parameters and the manifest.
    """

    def __init__(self, run: SavedRun, *, batch_size: int = 64):
        self.run = run
        self.class_names = run.class_names
        self._batch_size = batch_size

    def features(self, images: Any) -> Float32[np.ndarray, "N D"]:
        """Returns the pooled features of the backbone for every image.

        Raises:
            ValueError: an image cannot be read, or preprocessing yields different
                sizes; names the image.
        """
        return self._rows(self._features, images)["features"]

    def predict(self, images: Any) -> Float32[np.ndarray, "N C"]:
        """Returns the probability of every class, in the order of `class_names`.

        They add up to 1 per image unless the objective allows several classes per
        image; then each class has a separate probability. Of a regression the numbers
        are returned, in their own units.

        Raises:
            ValueError: the model has no head, an image cannot be read, or preprocessing
                yields different sizes; names the image.
        """
        found = self._rows(self._outputs, images)
        return found["numbers"] if "numbers" in found else found["probabilities"]

    @functools.cached_property
    def _features(self) -> list[Step]:
        return make_steps(self.run, classes=0, features=True)

    @functools.cached_property
    def _outputs(self) -> list[Step]:
        return make_steps(self.run, classes=None, features=False)

    def _rows(self, steps: Sequence[Step], images: Any) -> dict[str, np.ndarray]:
        source = _Images(images)
        guarded = Guarded(source, self.run.config.preprocess)
        # Powers of two, so that only a few batch sizes are compiled.
        power_of_two = 1 << (len(source) - 1).bit_length()
        batch_size = min(self._batch_size, power_of_two)
        found = run_steps(self.run, steps, guarded, batch_size, hidden=None)
        if guarded.errors:
            index, reason = min(guarded.errors.items())
            raise ValueError(f"{source.name(index)} cannot be read: {reason}")
        return found


class _Images:
    """The user's images as a source."""

    class_names: tuple[str, ...] = ()
    fingerprint: str = ""

    def __init__(self, images: Any):
        one = isinstance(images, bytes | str) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        )
        if one:
            found = (
                f"an array of shape {images.shape}"
                if isinstance(images, np.ndarray)
                else f"one {type(images).__name__}"
            )
            raise ValueError(
                f"images is {found}; expected an array [N, H, W, C] or a sequence of "
                "images. Put one image in a list: [image]."
            )
        if not len(images):
            raise ValueError("images is empty; give at least one.")
        self._images = images
        for index in range(len(images)):
            self._check(index, images[index])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        image = self._images[index]
        return {
            "image": image if isinstance(image, bytes) else np.asarray(image).copy(),
            "index": index.__index__(),
        }

    def name(self, index: Any) -> str:
        """Returns the image's place in the sequence, for messages."""
        return f"images[{index.__index__()}]"

    def _check(self, index: int, image: Any) -> None:
        if isinstance(image, bytes):
            return
        kind = getattr(image, "dtype", None)
        shape = getattr(image, "shape", ())
        if kind != np.uint8 or len(shape) not in (2, 3) or 0 in shape:
            what = type(image).__name__ if kind is None else f"{kind} {tuple(shape)}"
            raise ValueError(
                f"{self.name(index)} is {what}; expected uint8 [H, W, C] or [H, W] in "
                "0..255, or the bytes of an image file. Floats in 0..1 become that by "
                "np.uint8(np.round(255 * image))."
            )


def load(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    allowed_modules: Sequence[str] = (),
    part: str = "",
) -> LoadedModel:
    """Implements `big_vision_lite.load`, on the devices of this process."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no number of images; use 64.")
    run = load_lib.load(
        path,
        allowed_modules=allowed_modules,
        devices=jax.local_devices(),
        part=part,
    )
    return LoadedModel(run, batch_size=batch_size)


def make_steps(
    run: SavedRun,
    *,
    classes: int | None,
    features: bool,
    log: Callable[[str], None] = print,
) -> list[Step]:
    """Returns jitted functions from a state and a batch to one output row per image.

    Outputs are "classes" and "probabilities" [B, K] of the `classes` most probable ones
    (0: neither; None: "probabilities" [B, C] of all, in label order) and, if requested,
    the pooled "features" [B, D]. Where logits are no classes, they are "numbers" [B, C]
    in place of both.
    """
    model = run.config.model
    part, backbone = backbone_of(model)
    steps = []
    if classes != 0:
        # Asked once, and only of a model that has a head.
        asked = functools.cache(lambda: meaning_of_logits(run, log))

        def classify(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            outputs = forward(**_inputs(model, batch))
            check_head(run, outputs)
            meaning = asked()
            likely = meaning.outputs(outputs["logits"].astype(jnp.float32))
            rows = {"probabilities": likely}
            if meaning == Logits.NONE:
                rows = {"numbers": run.config.objective.predictions(likely)}
            elif classes is not None:
                best = jax.lax.top_k(likely, min(classes, likely.shape[-1]))
                rows = {"probabilities": best[0], "classes": best[1]}
            if features and not part:
                rows["features"] = _pooled(outputs)
            return rows

        steps.append(_make_step(run, classify, model, ""))
    if features and (part or classes == 0):

        def represent(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            return {"features": _pooled(forward(**_inputs(backbone, batch)))}

        steps.append(_make_step(run, represent, backbone, part))
    return steps


def run_steps(
    run: SavedRun,
    steps: Sequence[Step],
    images: Guarded,
    batch_size: int,
    *,
    hidden: bool | None,
) -> dict[str, np.ndarray]:
    """Returns the outputs of `steps`, one row per example, in order.

    Rows of images in `images.errors` are zeros. `batch_size` is rounded up to a
    multiple of the devices; progress is shown in a terminal or notebook unless
    `hidden`.

    Raises:
        ValueError: not one image can be read, or preprocessing gives several sizes.
    """
    num_devices = run.mesh.size
    batch_size = -(-min(batch_size, len(images)) // num_devices) * num_devices
    # Among any number of unreadable ones a readable image is found.
    batches = pipeline.eval_batches(
        images, (images,), batch_size, run.mesh, attempts=len(images)
    )
    console = Console()
    if hidden is None:
        shown = console.is_terminal or console.is_jupyter
        hidden = not shown or len(images) <= 4 * batch_size
    progress = track(
        batches, "predicting", console=console, transient=True, disable=hidden
    )
    found: dict[str, np.ndarray] = {}
    try:
        with jax.set_mesh(run.mesh):
            for batch in progress:
                rows = jax.device_get([step(run.state, batch) for step in steps])
                _put(rows, batch, found, len(images))
    except ValueError as error:
        if len(images.errors) < len(images):
            raise
        raise _nothing_read(images) from error
    return found


def _put(
    rows: Sequence[Mapping[str, np.ndarray]],
    batch: Batch,
    found: dict[str, np.ndarray],
    count: int,
) -> None:
    """Copies the readable rows of a batch to their places among `count`."""
    valid = np.asarray(batch["valid"])
    places = np.asarray(batch["index"])[valid]
    for name, values in (item for each in rows for item in each.items()):
        # Rows of unreadable images stay zeros, even if all of a batch are.
        if name not in found:
            found[name] = np.zeros((count, *values.shape[1:]), values.dtype)
        found[name][places] = values[valid]


def _nothing_read(images: Guarded) -> ValueError:
    index, reason = min(images.errors.items())
    name, count = images.name(index), len(images)
    if count == 1:
        return ValueError(f"{name} cannot be read: {reason}")
    return ValueError(
        f"Not one of {count} images can be read; the first is {name}: {reason}"
    )


def _make_step(run: SavedRun, function: Any, model: Model, part: str) -> Step:
    return step_lib.make_eval_step(
        model,
        function,
        seed=run.config.seed,
        num_steps=int(run.manifest["num_steps"]),
        part=part,
    )


def _inputs(model: Model, batch: Batch) -> dict[str, Any]:
    try:
        return model.inputs(batch)
    except KeyError as error:
        raise ValueError(
            f"{type(model).__name__}.inputs asks for {error}, but predict has images "
            "alone. Let it leave out what the batch has not, or take the features of "
            "its backbone: --embed features.npz without --out, in Python "
            "model.features(images)."
        ) from error


def _pooled(outputs: Mapping[str, Any]) -> Array:
    if "pooled" not in outputs:
        raise ValueError(
            f"The model gives {', '.join(sorted(outputs))}; features need "
            '"pooled" [B, D].'
        )
    return outputs["pooled"].astype(jnp.float32)


def check_head(run: SavedRun, outputs: Mapping[str, Any]) -> None:
    """Raises ValueError unless the model returns one logit per class of the data."""
    if "logits" not in outputs:
        raise ValueError(
            f"The model of {run.folder} has no head, so it names no classes. Write its "
            "features with --embed features.npz and without --out (in Python: "
            "model.features(images)), or give it a head by fine-tuning: --config "
            f"configs/finetune.py:init={run.folder},data=FOLDER"
        )
    width, count = outputs["logits"].shape[-1], len(run.class_names)
    if run.class_names and width != count:
        raise ValueError(
            f"The model has {width} logits, but {run.folder} names {count} classes."
        )


def meaning_of_logits(run: SavedRun, log: Callable[[str], None]) -> Logits:
    """Returns what the run's logits mean; logs it where the objective does not say.

    Raises:
        ValueError: neither the objective nor class names say it.
    """
    objective = run.config.objective
    if objective.logits is not None:
        return objective.logits
    name = type(objective).__name__
    declare = "give the class logits: ClassVar = Logits.SIGMOID"
    if not run.class_names:
        raise ValueError(
            f"{name} does not say what its logits mean, and {run.folder} names no "
            f"classes: they may be numbers. Say it, {declare} (several classes an "
            "image), Logits.SOFTMAX (one) or Logits.NONE (numbers), with Logits from "
            "big_vision_lite.types."
        )
    words = (
        f"{name} does not say what its logits mean: taken as one class an image "
        f"(softmax). If several may be right, {declare}, with Logits from "
        "big_vision_lite.types"
    )
    log(str(Assumption(About.LOGITS, words)))
    return Logits.SOFTMAX
