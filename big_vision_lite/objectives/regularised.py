"""Views drawn together, kept from collapse by a penalty on their distribution."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from big_vision_lite.objectives.collapse import spread
from big_vision_lite.objectives.views import flat_views, mean_over, split, valid_rows
from big_vision_lite.types import Batch, Forward, Objective

# B images, V views, D dimensions, M directions, T knots

EPSILON = 1e-4


@dataclasses.dataclass(kw_only=True)
class VICReg(Objective):
    """Variance, invariance, covariance of two views' embeddings (arXiv:2105.04906).

    weight_invariance * mean square distance of the views + weight_variance * mean of
    max(0, 1 - deviation) over dimensions, averaged over both views + weight_covariance
    * the sum of squares of covariances beside the diagonal / D, added over both. All
    statistics are those of the global batch. Defaults are the paper's.
    Metrics: the three parts and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    weight_invariance: float = 25.0
    weight_variance: float = 25.0
    weight_covariance: float = 1.0
    views: str = "views"

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        images = flat_views(batch, self.views, least=2)
        outputs = forward(image=images)
        z = split(outputs["embedding"].astype(jnp.float32), batch, self.views)[:, :2]
        valid = valid_rows(batch, len(z))
        count = jnp.maximum(valid.sum(), 2)
        invariance = jnp.square(z[:, 0] - z[:, 1]).mean(axis=1)
        centred = jnp.where(valid[:, None, None], z - mean_over(z, valid), 0)
        covariance = jnp.einsum("bvi,bvj->vij", centred, centred) / (count - 1)
        diagonal = jnp.einsum("vii->vi", covariance)
        deviation = jnp.sqrt(diagonal + EPSILON)
        variance = jnp.maximum(0, 1 - deviation).mean()
        beside = jnp.square(covariance).sum() - jnp.square(diagonal).sum()
        beside = beside / z.shape[-1]
        losses = (
            self.weight_invariance * invariance
            + self.weight_variance * variance
            + self.weight_covariance * beside
        )
        metrics = {
            "invariance": invariance,
            "variance": variance,
            "covariance": beside,
            **spread(outputs["pooled"]),
        }
        return losses, metrics


@dataclasses.dataclass(kw_only=True)
class LeJEPA(Objective):
    """Views drawn to their mean, embeddings to a standard Gaussian (arXiv:2511.08544).

    (1 - weight) * prediction + weight * SIGReg. Prediction is the mean square distance
    of a view's embedding from the mean over all views of its image, with gradient
    through both. SIGReg tests, by `sigreg`, whether the embeddings of each view are
    normal along `directions` drawn anew at every step; means are over the global batch.
    No teacher, no schedule. Metrics: prediction, sigreg and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    weight: float = 0.02
    directions: int = 256
    views: tuple[str, ...] = ("views",)

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.directions < 1 or not self.views:
            raise ValueError(
                f"LeJEPA(weight={self.weight}, directions={self.directions}, "
                f"views={self.views}): weight is in 0..1, 0.02 for example, the others "
                "are there."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        found, pooled = [], []
        for key in self.views:
            least = 2 if len(self.views) == 1 else 1
            outputs = forward(image=flat_views(batch, key, least))
            embedding = outputs["embedding"].astype(jnp.float32)
            found.append(split(embedding, batch, key))
            pooled.append(outputs["pooled"])
        z = jnp.concatenate(found, axis=1)
        prediction = jnp.square(z - z.mean(axis=1, keepdims=True)).mean(axis=(1, 2))
        shape = (z.shape[-1], self.directions)
        directions = jax.random.normal(rng, shape)
        directions = directions / jnp.linalg.norm(directions, axis=0)
        regular = sigreg(z, directions, valid_rows(batch, len(z)))
        losses = (1 - self.weight) * prediction + self.weight * regular
        metrics = {"prediction": prediction, "sigreg": regular, **spread(pooled[0])}
        return losses, metrics


def sigreg(
    z: Float[Array, "B V D"],
    directions: Float[Array, "D M"],
    valid: Bool[Array, " B"],
    largest: float = 3.0,
    knots: int = 17,
) -> Float[Array, ""]:
    """Returns the Epps-Pulley statistic of embeddings, mean over directions and views.

    B times the integral over t in [-largest, largest] of the squared distance of the
    characteristic function of the projections from exp(-t^2 / 2), weighted by
    exp(-t^2 / 2), by the trapezoidal rule on `knots` in [0, largest]: 0 for an ideal
    standard Gaussian.
    """
    t = np.linspace(0, largest, knots, dtype=np.float32)
    step = t[1] - t[0]
    # Twice the half: both parts are symmetric in t.
    weights = np.full(knots, 2 * step, np.float32)
    weights[[0, -1]] = step
    gaussian = np.exp(-np.square(t) / 2)
    angle = (z @ directions)[..., None] * t
    cosine, sine = (mean_over(f(angle), valid) for f in (jnp.cos, jnp.sin))
    distance = jnp.square(cosine - gaussian) + jnp.square(sine)
    statistic = (distance * (weights * gaussian)).sum(axis=-1) * valid.sum()
    return statistic.mean()
