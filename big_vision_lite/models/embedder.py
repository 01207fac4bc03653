"""A backbone and a projection head, for objectives that compare embeddings."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

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
    `patch_prototypes` are those of single patches, which `score_patches` compares after
    a projector of their own, as iBOT does (arXiv:2111.07832). `centre_momentum` keeps
    running means of such scores, the collection "centres", which `observe` moves; None
    keeps none. `replaced` [B, N] is true where the encoder, a ViT with
    mask_token=True, sees a learned token in place of a patch. After training only the
    encoder is used.
    """

    backbone: ClassVar = "encoder"
    head_modules: ClassVar = ()

    encoder: Model
    projector: Projector
    prototypes: int = 0
    centre_momentum: float | None = None
    patch_projector: Projector | None = None
    patch_prototypes: int = 0

    def __post_init__(self) -> None:
        for name in ("prototypes", "patch_prototypes"):
            if (number := getattr(self, name)) < 0 or number == 1:
                raise ValueError(f"{name}={number}: use 0 for none, or many.")
        if (self.patch_projector is None) != (self.patch_prototypes == 0):
            raise ValueError(
                f"patch_prototypes={self.patch_prototypes} with patch_projector="
                f"{self.patch_projector}: give both, or neither."
            )
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
        self,
        image: Num[Array, "B H W C"],
        *,
        train: bool = False,
        replaced: Bool[Array, "B N"] | None = None,
    ) -> dict[str, Array]:
        encoder: Any = self.encoder
        outputs = encoder(image, train=train, **self._hidden(replaced))
        embedding = self.projector(outputs["pooled"], train)
        found = {**outputs, "embedding": embedding}
        if self.prototypes:
            kernel = self._prototypes("prototypes", self.projector, self.prototypes)
            found["scores"] = unit(embedding) @ kernel
        if self.patch_prototypes and self.is_initializing():
            self.score_patches(outputs["grid"][:, 0], train=train)
        if self.centre_momentum is not None:
            found |= {name: centre.value for name, centre in self._centres().items()}
        return found

    @nn.compact
    def score_patches(
        self, tokens: Float[Array, "B n E"], *, train: bool = False
    ) -> dict[str, Array]:
        """Returns {"scores": [B, n, K]} of single patches, the cells of "grid"."""
        projector = self.patch_projector
        if projector is None:
            raise ValueError(
                "The model has no head for patches: give it patch_prototypes=K and "
                "patch_projector=Projector(...), or the objective patches=None."
            )
        rows = projector(tokens.reshape(-1, tokens.shape[-1]), train)
        kernel = self._prototypes("patch_prototypes", projector, self.patch_prototypes)
        return {"scores": (unit(rows) @ kernel).reshape(*tokens.shape[:2], -1)}

    @nn.compact
    def observe(
        self, means: dict[str, Float[Array, " K"]], *, train: bool = False
    ) -> dict[str, Array]:
        """Moves "centre" and "patch_centre" towards the means given by these names."""
        momentum = self.centre_momentum
        for name, centre in self._centres().items():
            if train and momentum is not None and name in means:
                mean = jax.lax.stop_gradient(means[name])
                centre.value = momentum * centre.value + (1 - momentum) * mean
        return {}

    def _hidden(self, replaced: Array | None) -> dict[str, Array]:
        if replaced is None:
            return {}
        if not getattr(self.encoder, "mask_token", False):
            raise ValueError(
                f"{type(self.encoder).__name__} has no token to put in place of hidden "
                "patches: use --config.model.encoder.mask_token=True, which ViT has, "
                "or the objective with patches=None."
            )
        return {"replaced": replaced}

    def _prototypes(self, name: str, projector: Projector, number: int) -> Array:
        start = nn.initializers.normal(0.02)
        return unit(self.param(name, start, (projector.features, number)), axis=0)

    def _centres(self) -> dict[str, Any]:
        sizes = {"centre": self.prototypes, "patch_centre": self.patch_prototypes}
        return {
            name: self.variable("centres", name, jnp.zeros, (number,), jnp.float32)
            for name, number in sizes.items()
            if number
        }


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Returns vectors divided by their length, at least 1e-12."""
    # Not a norm, whose gradient at 0 is not finite.
    square = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
