"""Contrast of views: each finds the others of its image among the whole batch."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.objectives.collapse import spread
from big_vision_lite.objectives.views import flat_views, split, unit, valid_rows
from big_vision_lite.types import Batch, Forward, Objective


@dataclasses.dataclass(kw_only=True)
class NTXent(Objective):
    """SimCLR's loss (arXiv:2002.05709, equation 1) on the views under `views`.

    For each view: the cross-entropy of finding another view of its image among all
    other views of the global batch, by the cosine of the "embedding" over
    `temperature`; the mean over an image's views. Metrics: retrieved, the share of
    views whose nearest is of the same image, and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    temperature: float = 0.1
    views: str = "views"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        images = flat_views(batch, self.views, least=2)
        size, count = batch[self.views].shape[:2]
        if size < 2:
            raise ValueError(
                "A batch of one image has nothing to contrast with; use "
                "--config.data.batch_size=2 or more, hundreds are usual."
            )
        outputs = forward(image=images)
        z = unit(outputs["embedding"])
        image = jnp.repeat(jnp.arange(size), count)
        valid = valid_rows(batch, size)[image]
        others = ~jnp.eye(len(z), dtype=bool) & valid[None, :]
        similarity = jnp.where(others, z @ z.T / self.temperature, -jnp.inf)
        log_share = jax.nn.log_softmax(similarity, axis=1)
        positive = others & (image[:, None] == image[None, :])
        total = jnp.where(positive, log_share, 0).sum(axis=1)
        losses = -total / jnp.maximum(positive.sum(axis=1), 1)
        nearest = image[similarity.argmax(axis=1)]
        found = split((nearest == image).astype(jnp.float32), batch, self.views)
        losses = split(losses, batch, self.views).mean(axis=1)
        return losses, {"retrieved": found.mean(axis=1), **spread(outputs["pooled"])}
