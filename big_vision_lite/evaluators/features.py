"""Feature vectors of whole image sets: of a network, or the pixels themselves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from big_vision_lite.runs.evaluations import Context, EvalStep, RowFunction
from big_vision_lite.types import Array, Batch, Forward, Model, Op, Source

# Raw pixels are shrunk to this side first: more pixels make a worse control and a slow
# one.
RAW_PIXELS_SIDE = 32


@dataclasses.dataclass(kw_only=True)
class Features:
    """One vector and one label a readable image, in the order of the source."""

    vectors: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, " N"]
    unreadable: int


def pooled(model: Model) -> RowFunction:
    """Returns the function of an eval step that gives the model's representation.

    That is "pooled", or what a tanh layer makes of it where the head has one: the
    "pre_logits" of the few-shot protocol.
    """

    def function(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
        outputs = forward(**model.inputs(batch))
        vectors = outputs.get("pre_logits", outputs.get("pooled"))
        if vectors is None:
            raise ValueError(
                f"The model gives {', '.join(sorted(outputs))}; features need "
                '"pooled" [B, D].'
            )
        return {"vectors": vectors.astype(jnp.float32), "label": batch["label"]}

    return function


def raw_pixels(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
    """Gives pixels in 0..1, averaged over areas to a longer side of at most 32."""
    del forward, rng
    small = shrink(batch["image"].astype(jnp.float32) / 255.0, RAW_PIXELS_SIDE)
    return {"vectors": small.reshape(len(small), -1), "label": batch["label"]}


def shrink(image: Float[Array, "B H W C"], side: int) -> Float[Array, "B h w C"]:
    """Averages areas of pixels until the longer side is at most `side`."""
    height, width = image.shape[1:3]
    scale = min(1.0, side / max(height, width))
    rows = area_weights(height, max(1, round(height * scale)))
    columns = area_weights(width, max(1, round(width * scale)))
    return jnp.einsum(
        "hH,bHWc,wW->bhwc", rows, image, columns, precision=jax.lax.Precision.HIGHEST
    )


def area_weights(size: int, target: int) -> Float[np.ndarray, "target size"]:
    """Returns what each of `size` pixels adds to each of `target` equal parts."""
    edges = np.arange(target + 1) * (size / target)
    pixels = np.arange(size)
    begin = np.maximum(edges[:-1, None], pixels)
    end = np.minimum(edges[1:, None], pixels + 1)
    return (np.maximum(end - begin, 0) * (target / size)).astype(np.float32)


def check(
    context: Context,
    step: EvalStep,
    source: Source,
    ops: Sequence[Op],
    batch_size: int,
) -> None:
    """Refuses, before any step, what `extract` could not make features of.

    Raises:
        ValueError: the labels are not one number an image; as `Context.check_step`.
    """
    rows = context.check_step(step, source, ops, batch_size)
    if rows["label"].ndim != 1:
        raise ValueError(
            f"{context.name}: {source.name(0)} has several labels an image; few-shot "
            "and nearest-neighbour scores need exactly one."
        )


def extract(
    context: Context,
    step: EvalStep,
    state: Any,
    source: Source,
    ops: Sequence[Op],
    batch_size: int,
) -> Features:
    """Runs `step` over all of `source`; unreadable images are left out and counted.

    Raises:
        ValueError: no image could be read.
    """
    rows = list(context.rows(step, state, source, ops, batch_size))
    vectors = np.concatenate([row["vectors"] for row in rows])
    labels = np.concatenate([row["label"] for row in rows])
    if not len(vectors):
        raise ValueError(
            f"{context.name}: not one of {len(source)} images could be read, the first "
            f"is {source.name(0)}; look at them with tools/check_dataset.py."
        )
    unreadable = len(source) - len(vectors)
    return Features(vectors=vectors, labels=labels, unreadable=unreadable)
