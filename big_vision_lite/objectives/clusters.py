"""Prediction of the clusters of hidden patches (CAPI, arXiv:2502.08769)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.objectives.collapse import entropy, spread
from big_vision_lite.objectives.self_distillation import sinkhorn
from big_vision_lite.objectives.views import valid_rows
from big_vision_lite.types import Batch, Forward, Objective


@dataclasses.dataclass(kw_only=True)
class ClusterPrediction(Objective):
    """CAPI: from visible patches predict the clusters of the average's hidden ones.

    The recipe sets ema=Average(...) and model=MaskedClusters(...). The averaged encoder
    sees the whole image; its features' scores divided by `teacher_temperature`, and
    balanced by Sinkhorn over the global batch, are the targets: with `positionwise` at
    each position apart, so that no cluster stands for a place. The loss is the sum of
    the cross-entropies, in nats, of the predictions at hidden patches and of the
    clusters themselves at all patches, both at `temperature`; the second moves the
    clusters alone. Metrics: prediction_loss, cluster_loss, teacher_entropy,
    clusters_used (those that are the first choice of some patch) and those of
    `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    temperature: float = 0.12
    teacher_temperature: float = 0.06
    positionwise: bool = True

    def __post_init__(self) -> None:
        if min(self.temperature, self.teacher_temperature) <= 0:
            raise ValueError(
                f"temperature={self.temperature} and teacher_temperature="
                f"{self.teacher_temperature} must be above 0."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        image = batch["image"]
        if len(image) < 2:
            raise ValueError(
                "A batch of one image gives every cluster the same share; use "
                "--config.data.batch_size=2 or more, hundreds are usual."
            )
        grid = forward(image=image, params="ema", whole=True)["grid"]
        features = jax.lax.stop_gradient(grid.reshape(len(grid), -1, grid.shape[-1]))
        scores = forward(method="cluster", features=features)["scores"]
        targets = jax.lax.stop_gradient(self._targets(scores, batch))
        outputs = forward(image=image)
        losses = [
            -(targets * jax.nn.log_softmax(x / self.temperature)).sum(axis=-1)
            for x in (outputs["scores"], scores)
        ]
        masked = outputs["masked"]
        prediction = (losses[0] * masked).sum(axis=1) / masked.sum(axis=1)
        cluster = losses[1].mean(axis=1)
        first = jax.nn.one_hot(targets.argmax(axis=-1), targets.shape[-1])
        metrics = {
            "prediction_loss": prediction,
            "cluster_loss": cluster,
            "teacher_entropy": entropy(targets).mean(axis=1),
            "clusters_used": first.any(axis=(0, 1)).sum().astype(jnp.float32),
            **spread(outputs["pooled"]),
        }
        return prediction + cluster, metrics

    def _targets(
        self, scores: Float[Array, "B N K"], batch: Batch
    ) -> Float[Array, "B N K"]:
        scores = scores / self.teacher_temperature
        valid = valid_rows(batch, len(scores))
        if self.positionwise:
            balance = jax.vmap(sinkhorn, in_axes=(1, None), out_axes=1)
            return balance(scores, valid)
        rows = jnp.repeat(valid, scores.shape[1])
        balanced = sinkhorn(scores.reshape(-1, scores.shape[-1]), rows)
        return balanced.reshape(scores.shape)
