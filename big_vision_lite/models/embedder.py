"""A backbone and a projection head, for objectives that compare embeddings."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.blocks.batch_norm import BatchNorm
from big_vision_lite.types import Batch, Model


class Projector(nn.Module, kw_only=True):
    """An MLP from pooled features [B, E] to an embedding [B, D], float32.

    `hidden` are the widths before `features`, each followed by GELU and, with
    `batch_norm`, by batch norm before it: without that a network whose features start
    almost alike for all images may stay there.
    """

    hidden: tuple[int, ...] = (2048,)
    features: int = 128
    batch_norm: bool = True

    def __post_init__(self) -> None:
        sizes = {f"hidden[{i}]": width for i, width in enumerate(self.hidden)}
        layers.check_positive(features=self.features, **sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "B E"], train: bool) -> Float[Array, "B D"]:
        for index, width in enumerate(self.hidden):
            x = layers.Dense(features=width, name=f"hidden_{index}")(x)
            if self.batch_norm:
                norm = BatchNorm(name=f"norm_{index}")
                x = norm(x[:, None, None, :], train)[:, 0, 0]
            x = nn.gelu(x)
        return layers.Dense(features=self.features, name="out")(x)


class Embedder(nn.Module, Model, kw_only=True):
    """Returns what the encoder does and "embedding" [B, D] of its pooled features.

    With `prototypes` K also "scores" [B, K]: the cosines of the embedding with K
    learned unit vectors, as self-distillation compares them (arXiv:2104.14294).
    `centre_momentum` keeps a running mean of such scores, the collection "centres",
    which `observe` moves; None keeps none. After training only the encoder is used.
    """

    backbone: ClassVar = "encoder"
    head_modules: ClassVar = ()

    encoder: Model
    projector: Projector
    prototypes: int = 0
    centre_momentum: float | None = None

    def __post_init__(self) -> None:
        if self.prototypes < 0 or self.prototypes == 1:
            raise ValueError(f"prototypes={self.prototypes}: use 0 for none, or many.")
        if self.centre_momentum is not None:
            layers.check_rate("centre_momentum", self.centre_momentum)
            if not self.prototypes:
                raise ValueError("centre_momentum is for scores: give prototypes=K.")
        super().__post_init__()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the image, or the first of the views that stand in its place."""
        if "image" in batch:
            return {"image": batch["image"]}
        views = [x for x in batch.values() if getattr(x, "ndim", 0) == 5]
        if not views:
            raise ValueError(
                f"The batch has {', '.join(sorted(batch))}, neither an image nor views."
            )
        return {"image": views[0][:, 0]}

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        encoder: Any = self.encoder
        outputs = encoder(image, train=train)
        embedding = self.projector(outputs["pooled"], train)
        found = {**outputs, "embedding": embedding}
        if self.prototypes:
            shape = (self.projector.features, self.prototypes)
            kernel = self.param("prototypes", nn.initializers.normal(0.02), shape)
            found["scores"] = unit(embedding) @ unit(kernel, axis=0)
        if self.centre_momentum is not None:
            found["centre"] = self._centre().value
        return found

    @nn.compact
    def observe(
        self, scores: Float[Array, "B K"], *, train: bool = False
    ) -> dict[str, Array]:
        """Moves the centre towards the mean of `scores` over the global batch."""
        centre = self._centre()
        momentum = self.centre_momentum
        if train and momentum is not None:
            mean = jax.lax.stop_gradient(scores).mean(axis=0)
            centre.value = momentum * centre.value + (1 - momentum) * mean
        return {}

    def _centre(self) -> Any:
        return self.variable(
            "centres", "centre", jnp.zeros, (self.prototypes,), jnp.float32
        )


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Returns vectors divided by their length, at least 1e-12."""
    # Not a norm, whose gradient at 0 is not finite.
    square = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
