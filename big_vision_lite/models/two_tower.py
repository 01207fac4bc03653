"""Two towers, of images and of texts, whose vectors are compared: CLIP and SigLIP."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.embedder import unit
from big_vision_lite.models.text_transformer import TextTransformer
from big_vision_lite.types import Batch, Model

# B images, T texts, N tokens, E values of an embedding


class TwoTower(nn.Module, Model, kw_only=True):
    """Returns unit vectors "image_embedding" [B, E] and "text_embedding" [T, E].

    Also what the image tower does, and scalars: "temperature", which multiplies
    cosines, and "bias", which is added; losses read them. E is `features`: each tower's
    "pooled" is projected to it, the image's only with `project_image` (SigLIP's is not,
    and must be as wide), by layers with a bias where `projection_bias` says so.
    `temperature` and `bias` are where these start: learned, the temperature as its
    logarithm and never above `temperature_max`; bias None has none (CLIP,
    arXiv:2103.00020: 1 / 0.07, at most 100). Defaults are SigLIP's (arXiv:2303.15343).

    A call with only `image` or only `text` runs one tower. After training the image
    tower is used alone. Locked-image tuning (LiT, arXiv:2111.07991) is
    `freeze=("image_tower/.*",)` with `init` into that tower.
    """

    backbone: ClassVar = "image_tower"
    head_modules: ClassVar = ()
    free_fields: ClassVar = ("temperature", "bias")

    image_tower: Model
    text_tower: TextTransformer
    features: int
    project_image: bool = True
    projection_bias: bool = True
    temperature: float = 10.0
    temperature_max: float | None = None
    bias: float | None = -10.0

    def __post_init__(self) -> None:
        layers.check_positive(features=self.features)
        most = math.inf if self.temperature_max is None else self.temperature_max
        if not 0 < self.temperature <= most:
            raise ValueError(
                f"TwoTower: temperature={self.temperature} must be above 0 and at most "
                f"temperature_max={self.temperature_max}; SigLIP begins at 10."
            )
        super().__post_init__()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the image and, where the batch has one, the text."""
        text = {"text": batch["text"]} if "text" in batch else {}
        return {"image": batch["image"], **text}

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "B H W C"] | None = None,
        text: Int[Array, "T N"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        if self.is_initializing() and text is None:
            # Images alone make all parameters.
            text = jnp.zeros((1, self.text_tower.length), jnp.int32)
        outputs = {}
        if image is not None:
            tower: Any = self.image_tower
            outputs |= tower(image, train=train)
            outputs["image_embedding"] = self._image_embedding(outputs["pooled"])
        if text is not None:
            pooled = self.text_tower(text, train=train)["pooled"]
            outputs["text_embedding"] = unit(self._project("text_projection", pooled))
        start = nn.initializers.constant(math.log(self.temperature))
        log_temperature = jnp.asarray(self.param("log_temperature", start, ()))
        if self.temperature_max is not None:
            most = math.log(self.temperature_max)
            log_temperature = jnp.minimum(log_temperature, most)
        outputs["temperature"] = jnp.exp(log_temperature)
        if self.bias is not None:
            start = nn.initializers.constant(self.bias)
            outputs["bias"] = jnp.asarray(self.param("bias", start, ()))
        return outputs

    def _image_embedding(self, pooled: Float[Array, "B D"]) -> Float[Array, "B E"]:
        if self.project_image:
            return unit(self._project("image_projection", pooled))
        if pooled.shape[-1] != self.features:
            raise ValueError(
                f"TwoTower: project_image=False, but the image tower gives "
                f"{pooled.shape[-1]} values and features={self.features}; use "
                f"features={pooled.shape[-1]}, or project_image=True."
            )
        return unit(pooled)

    def _project(self, name: str, pooled: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return layers.Dense(
            features=self.features, use_bias=self.projection_bias, name=name
        )(pooled)
