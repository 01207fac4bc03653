"""What objectives on several views of an image share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from big_vision_lite.types import Batch


def flat_views(batch: Batch, key: str, least: int) -> Shaped[Array, "BV H W C"]:
    """Returns the views [B, V, H, W, C] under `key` as one batch, an image's together.

    Raises:
        ValueError: there are no such views, or fewer than `least` an image.
    """
    if key not in batch or batch[key].ndim != 5:
        raise ValueError(
            f'The batch has {", ".join(sorted(batch))}, no views "{key}". Make them by '
            f'an op of the stream: Views(views=(View(name="{key}", ops=(...), '
            f"count={least}),))."
        )
    views = batch[key]
    if views.shape[1] < least:
        raise ValueError(
            f'"{key}" holds {views.shape[1]} views an image, and at least {least} are '
            f'compared; use View(name="{key}", count={least}).'
        )
    return views.reshape(-1, *views.shape[2:])


def split(
    x: Shaped[Array, "BV ..."], batch: Batch, key: str
) -> Shaped[Array, "B V ..."]:
    """Returns outputs for the views under `key` with an axis of views of its own."""
    return x.reshape(*batch[key].shape[:2], *x.shape[1:])


def valid_rows(batch: Batch, count: int) -> Bool[Array, " B"]:
    """Returns which of `count` examples are no padding: all of them in training."""
    return batch["valid"] if "valid" in batch else jnp.ones(count, bool)


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns vectors divided by their length, at least 1e-12, in float32."""
    x = x.astype(jnp.float32)
    # Not a norm, whose gradient at 0 is not finite.
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def mean_over(
    x: Float[Array, "B ..."], valid: Bool[Array, " B"]
) -> Float[Array, "..."]:
    """Returns the mean over the valid rows of the global batch."""
    weight = valid.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(weight, x, 0).sum(axis=0) / jnp.maximum(valid.sum(), 1)
