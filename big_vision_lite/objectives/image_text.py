"""Images and texts that belong together: the losses of SigLIP and of CLIP."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vision_lite.objectives.collapse import spread
from big_vision_lite.objectives.ring import Part, all_pairs
from big_vision_lite.objectives.views import valid_rows
from big_vision_lite.types import Batch, Forward, Objective

# b images and texts of one device, of B in the batch; E values, N tokens

# Below any logit, and finite: infinite ones would have no gradient.
LOWEST = -1e30


@dataclasses.dataclass(kw_only=True)
class SigLIP(Objective):
    """Every pair of image and text of the batch is right or wrong (arXiv:2303.15343).

    An image's loss is the sum over all texts of -log sigmoid(z * (temperature * cosine
    + bias)), z = 1 for its own text and -1 for others; float32. With `equal_captions`
    texts of the same tokens are all right: where captions repeat, they would contradict
    each other. Pairs with padding do not count. Of D devices each holds (B / D)^2 pairs
    at a time. The batch has "image" and "text", int32 [B, N].

    Metrics: retrieved (the share of images whose nearest text is right), temperature,
    bias and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    equal_captions: bool = False

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs, rows, columns = _pairs(forward, batch)
        if self.equal_captions:
            rows["tokens"] = columns["tokens"] = batch["text"]
        shared = {"temperature": outputs["temperature"], "bias": outputs["bias"]}
        start = jnp.zeros(len(rows["image"]))
        of_rows = {"loss": start, **_nobody(start)}
        found, _ = all_pairs(_sigmoid, rows, columns, of_rows, {}, shared)
        return found["loss"], _metrics(found, outputs)


@dataclasses.dataclass(kw_only=True)
class CLIP(Objective):
    """Each image finds its text among the batch's, and back (arXiv:2103.00020).

    The mean of two cross-entropies in nats over temperature * cosine: of an image
    against all texts, and of its text against all images; float32. Padding is not among
    them. A bias of the model would cancel. Of D devices each holds (B / D)^2 pairs at a
    time. The batch has "image" and "text", int32 [B, N].

    Metrics: retrieved (the share of images whose nearest text is their own),
    temperature and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs, rows, columns = _pairs(forward, batch)
        shared = {"temperature": outputs["temperature"]}
        start = jnp.full(len(rows["image"]), LOWEST)
        of_rows = {"total": start, **_nobody(start)}
        images, texts = all_pairs(
            _softmax, rows, columns, of_rows, {"total": start}, shared
        )
        own = (rows["image"] * columns["text"]).sum(axis=1) * outputs["temperature"]
        losses = (images["total"] + texts["total"]) / 2 - own
        losses = jnp.where(rows["valid"], losses, 0)
        return losses, _metrics(images, outputs)


def _pairs(forward: Forward, batch: Batch) -> tuple[dict[str, Any], Part, Part]:
    """Returns the model's outputs, images as rows and texts as columns."""
    if len(batch["image"]) != len(batch["text"]) or batch["text"].ndim != 2:
        raise ValueError(
            f'"text" of shape {batch["text"].shape} for {len(batch["image"])} images; '
            "one text [N] an image is compared: Tokenize(captions=0) draws one of "
            "several."
        )
    outputs = forward(image=batch["image"], text=batch["text"])
    size = len(batch["image"])
    both = {"place": jnp.arange(size), "valid": valid_rows(batch, size)}
    image, text = (
        outputs[f"{kind}_embedding"].astype(jnp.float32) for kind in ("image", "text")
    )
    return outputs, {"image": image, **both}, {"text": text, **both}


def _cosines(rows: Part, columns: Part) -> Float[Array, "b b"]:
    # A TPU would round to bfloat16 otherwise, and temperatures multiply the error.
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(rows["image"], columns["text"].T, precision=highest)


def _right(rows: Part, columns: Part) -> Bool[Array, "b b"]:
    right = rows["place"][:, None] == columns["place"][None, :]
    if "tokens" in rows:
        right |= _equal(rows["tokens"], columns["tokens"])
    return right


def _equal(x: Int[Array, "b N"], y: Int[Array, "b N"]) -> Bool[Array, "b b"]:
    return (x[:, None, :] == y[None, :, :]).all(axis=-1)


def _both_valid(rows: Part, columns: Part) -> Bool[Array, "b b"]:
    return rows["valid"][:, None] & columns["valid"][None, :]


def _sigmoid(
    rows: Part, columns: Part, of_rows: Part, of_columns: Part, shared: Part
) -> tuple[Part, Part]:
    cosines, right = _cosines(rows, columns), _right(rows, columns)
    counted = _both_valid(rows, columns)
    logits = shared["temperature"] * cosines + shared["bias"]
    losses = -jax.nn.log_sigmoid(jnp.where(right, logits, -logits))
    loss = of_rows["loss"] + jnp.where(counted, losses, 0).sum(axis=1)
    return {"loss": loss, **_nearest(of_rows, cosines, right, counted)}, of_columns


def _softmax(
    rows: Part, columns: Part, of_rows: Part, of_columns: Part, shared: Part
) -> tuple[Part, Part]:
    cosines, right = _cosines(rows, columns), _right(rows, columns)
    counted = _both_valid(rows, columns)
    logits = jnp.where(counted, shared["temperature"] * cosines, LOWEST)
    of_image, of_text = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    images = {
        "total": jnp.logaddexp(of_rows["total"], of_image),
        **_nearest(of_rows, cosines, right, counted),
    }
    return images, {"total": jnp.logaddexp(of_columns["total"], of_text)}


def _nobody(start: Float[Array, " B"]) -> Part:
    lowest = jnp.full_like(start, LOWEST)
    return {"nearest_right": lowest, "nearest_wrong": lowest}


def _nearest(
    of_rows: Part,
    cosines: Float[Array, "b b"],
    right: Bool[Array, "b b"],
    counted: Bool[Array, "b b"],
) -> Part:
    """Returns the largest cosine with a right text, and with a wrong one."""
    cosines = jax.lax.stop_gradient(cosines)
    found = {}
    for name, chosen in (("nearest_right", right), ("nearest_wrong", ~right)):
        most = jnp.where(chosen & counted, cosines, LOWEST).max(axis=1)
        found[name] = jnp.maximum(of_rows[name], most)
    return found


def _metrics(found: Part, outputs: dict[str, Any]) -> dict[str, Array]:
    metrics = {
        "retrieved": found["nearest_right"] > found["nearest_wrong"],
        "temperature": outputs["temperature"],
        **spread(outputs["pooled"]),
    }
    return metrics | ({"bias": outputs["bias"]} if "bias" in outputs else {})
