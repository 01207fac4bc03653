"""Extracts feature vectors of image sets: pooled features, or raw pixels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.runs.evaluations import Context, EvalStep, RowFunction
from big_vision_lite.training.forward import MissingOutput
from big_vision_lite.types import Array, Batch, Forward, Model, Op, Source

# Longer side in px to which raw pixels are shrunk: more make a worse, slower control.
RAW_PIXELS_SIDE = 32


@dataclasses.dataclass(kw_only=True)
class Features:
    """One vector and one label per readable image, in the order of the source."""

    vectors: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, " N"]
    unreadable: int


def of_model(model: Model, output: str = "") -> RowFunction:
    """Returns an eval-step function that gives features ("vectors") and labels.

    The features, float32 [B, D], are "pooled", or "pre_logits" if the head has a tanh
    layer, as in the few-shot protocol. `output` names another output of the model, or a
    module such as "encoder/block_05"; positions [B, h, w, D] and tokens [B, N, D] are
    averaged.
    """

    def function(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
        outputs = forward(**model.inputs(batch))
        name = output or ("pre_logits" if "pre_logits" in outputs else "pooled")
        if output and output not in outputs:
            try:
                outputs = forward(**model.inputs(batch), capture=(output,))["captured"]
            except MissingOutput as error:
                raise MissingOutput(
                    f'output="{output}" is no output of the model, which gives '
                    f"{some(sorted(outputs))}, and no module, named like "
                    f'"encoder/block_03".{did_you_mean(output, outputs)}'
                ) from error
        return {"vectors": _averaged(outputs[name], name), "label": batch["label"]}

    return function


def _averaged(x: Any, name: str) -> Float[Array, "B D"]:
    if not isinstance(x, jax.Array) or x.ndim < 2:
        shown = x.shape if isinstance(x, jax.Array) else type(x).__name__
        raise ValueError(
            f'output="{name}" is {shown}, no features [B, ..., D]; name a block or '
            "another output."
        )
    return x.astype(jnp.float32).mean(axis=tuple(range(1, x.ndim - 1)))


def raw_pixels(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
    """Returns pixels in 0..1, area-averaged to a longer side of at most 32 px."""
    del forward, rng
    small = shrink(batch["image"].astype(jnp.float32) / 255.0, RAW_PIXELS_SIDE)
    return {"vectors": small.reshape(len(small), -1), "label": batch["label"]}


def shrink(image: Float[Array, "B H W C"], side: int) -> Float[Array, "B h w C"]:
    """Returns images area-averaged to a longer side of at most `side` px."""
    height, width = image.shape[1:3]
    scale = min(1.0, side / max(height, width))
    rows = area_weights(height, max(1, round(height * scale)))
    columns = area_weights(width, max(1, round(width * scale)))
    return jnp.einsum(
        "hH,bHWc,wW->bhwc", rows, image, columns, precision=jax.lax.Precision.HIGHEST
    )


def area_weights(size: int, target: int) -> Float[np.ndarray, "target size"]:
    """Returns the weight of each of `size` pixels in each of `target` equal areas."""
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
    """Checks, before any step, that `extract` can compute features of `source`.

    Raises:
        ValueError: images have several labels each, or `Context.check_step` raises.
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
    """Returns features of all of `source`; unreadable images are skipped and counted.

    Raises:
        ValueError: no image could be read.
    """
    rows = context.rows(step, state, source, ops, batch_size)
    vectors, labels = rows["vectors"], rows["label"]
    unreadable = len(source) - len(vectors)
    return Features(vectors=vectors, labels=labels, unreadable=unreadable)
