"""Captions predicted id by id from the image."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.objectives.collapse import spread
from big_vision_lite.types import Batch, Forward, Objective


@dataclasses.dataclass(kw_only=True)
class Captioning(Objective):
    """The mean cross-entropy of a caption's ids, in nats (CapPa, arXiv:2306.07915).

    The batch has "image" and "text", int32 [B, N]; ids equal to `padding` do not count,
    and a caption of padding alone has the loss 0. The model says which captions it
    predicts in parallel: Captioner(parallel_prediction=0.75). Metrics: id_accuracy,
    parallel (the share of those captions) and those of `collapse.spread`.
    """

    padding: int = 0

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        text = batch["text"]
        if text.ndim != 2:
            raise ValueError(
                f'"text" has the shape {text.shape}; one caption [N] an image is '
                "predicted: Tokenize(captions=0) draws one of several."
            )
        outputs = forward(image=batch["image"], text=text)
        logits = outputs["token_logits"].astype(jnp.float32)
        own = jnp.take_along_axis(logits, text[:, :, None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - own
        counted = text != self.padding
        count = jnp.maximum(counted.sum(axis=1), 1)

        def mean(x: Array) -> Array:
            return jnp.where(counted, x, 0).sum(axis=1) / count

        metrics = {
            "id_accuracy": mean(logits.argmax(axis=-1) == text),
            "parallel": outputs["parallel"],
            **spread(outputs["pooled"]),
        }
        return mean(losses), metrics
