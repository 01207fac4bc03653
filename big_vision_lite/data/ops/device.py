"""Ops on the global batch inside the train step: they mix images and their labels."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from big_vision_lite.data.ops import spatial
from big_vision_lite.runtime.layout import pin_batch
from big_vision_lite.types import Batch

# B rows of the global batch, H W pixels, C classes


class Partner(enum.StrEnum):
    """The row of the batch that each row is mixed with.

    ROLL      the row before it: each device gets one row from its neighbour.
    REVERSE   the row at the same place from the end (BiT): pairs meet twice, and the
              middle row of an odd batch meets itself. Devices swap rows in pairs.

    A random permutation would gather all images on all devices.
    """

    ROLL = "roll"
    REVERSE = "reverse"


@dataclasses.dataclass(kw_only=True)
class Mixup:
    """Blends every image and its label with a partner's, one share for the batch.

    Takes "image" [B, H, W, C] in 0..255 and "label", int [B] or float [B, num_classes];
    returns both as float32, labels [B, num_classes], and leaves other keys alone.
    Without "label" it mixes images only, and needs no num_classes. The share is drawn
    from Beta(alpha, alpha), arXiv:1710.09412, and folded into [0.5, 1] by default, as
    in big_vision, so that a row stays mostly itself (BiT-HyperRule: `fold_lambda=False,
    partner="reverse"`). alpha=0 mixes nothing. Raises ValueError for "mask",
    "boxes" and "target" (numbers of a regression), which cannot be mixed.
    """

    num_classes: int | None = None
    alpha: float = 0.2
    partner: Partner = Partner.ROLL
    fold_lambda: bool = True

    def __post_init__(self):
        _check(self)

    def __call__(self, batch: Batch, rng: Array) -> dict[str, Array]:
        mixed = _as_float(batch, self)
        if self.alpha > 0:
            share = symmetric_beta(rng, self.alpha)
            if self.fold_lambda:
                share = jnp.maximum(share, 1 - share)
            mixed = {
                key: share * rows + (1 - share) * _partner(rows, self.partner)
                for key, rows in mixed.items()
            }
        return {**batch, **mixed}


@dataclasses.dataclass(kw_only=True)
class CutMix:
    """Pastes a rectangle of a partner into every image, and mixes labels by its area.

    One rectangle serves the batch (arXiv:1905.04899). It has the image's aspect and the
    share 1 - lambda of its area, with lambda from Beta(alpha, alpha) and a uniform
    centre, and is cut off at the borders. Input and output are those of Mixup. alpha=0
    mixes nothing.
    """

    num_classes: int | None = None
    alpha: float = 1.0
    partner: Partner = Partner.ROLL

    def __post_init__(self):
        _check(self)

    def __call__(self, batch: Batch, rng: Array) -> dict[str, Array]:
        mixed = _as_float(batch, self)
        if self.alpha > 0:
            image = mixed["image"]
            pasted = _rectangle(rng, self.alpha, *image.shape[1:3])
            other = _partner(image, self.partner)
            mixed["image"] = jnp.where(pasted[:, :, None], other, image)
            if "label" in mixed:
                label, share = mixed["label"], 1 - pasted.mean(dtype=jnp.float32)
                other = _partner(label, self.partner)
                mixed["label"] = share * label + (1 - share) * other
        return {**batch, **mixed}


def symmetric_beta(rng: Key[Array, ""], alpha: float) -> Float[Array, ""]:
    """Draws from Beta(alpha, alpha), alpha > 0, without a loop on the device.

    jax.random.beta rejects in while loops, which take seconds to compile and make a GPU
    wait for the host in every step. L. Devroye, Non-Uniform Random Variate Generation
    (1986), chapter IX.4: the polar form for alpha > 1/2, Johnk's rejection otherwise.
    """
    if alpha > 0.5:
        u, v = jax.random.uniform(rng, (2,))
        radius = jnp.sqrt(1 - u ** (1 / (alpha - 0.5)))
        return 0.5 + 0.5 * radius * jnp.cos(2 * jnp.pi * v)
    # A candidate is accepted with probability 0.78 or more; 32 fail with 1e-21.
    log_x, log_y = jnp.log1p(-jax.random.uniform(rng, (2, 32))) / alpha
    accepted = jnp.argmax(jnp.logaddexp(log_x, log_y) <= 0)
    return jax.nn.sigmoid(log_x[accepted] - log_y[accepted])


def _rectangle(
    rng: Key[Array, ""], alpha: float, height: int, width: int
) -> Bool[Array, "{height} {width}"]:
    """Returns a mask that is True where the partner's pixels go."""
    key_share, key_row, key_column = jax.random.split(rng, 3)
    side = jnp.sqrt(1 - symmetric_beta(key_share, alpha))

    def inside(key: Key[Array, ""], length: int) -> Bool[Array, " {length}"]:
        cut = jnp.floor(side * length).astype(jnp.int32)
        start = jax.random.randint(key, (), 0, length) - cut // 2
        at = jnp.arange(length)
        return (start <= at) & (at < start + cut)

    return inside(key_row, height)[:, None] & inside(key_column, width)[None, :]


def _as_float(batch: Batch, op: Mixup | CutMix) -> dict[str, Float[Array, "B ..."]]:
    """Returns "image", and "label" [B, C] if the batch has one, as float32."""
    name, num_classes = type(op).__name__, op.num_classes
    if "image" not in batch:
        raise ValueError(
            f'{name} mixes "image", which is not among {", ".join(sorted(batch))}; '
            "leave it out, or keep the image."
        )
    spatial.refuse(dict(batch), name, "mixes images")
    if "target" in batch:
        raise ValueError(
            f'{name} mixes images and classes, but the batch has "target", the numbers '
            "of a regression, which would stay those of one image; leave it out."
        )
    image = jnp.asarray(batch["image"]).astype(jnp.float32)
    if "label" not in batch:
        return {"image": image}
    if num_classes is None:
        raise ValueError(
            f"{name} got labels and no num_classes: give it the number of classes of "
            f'the head, {name}(num_classes=...), or drop "label" by Keep(keys=...).'
        )
    label = jnp.asarray(batch["label"])
    if label.ndim == 2 and jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"{name} got labels of shape {label.shape}, the numbers of several tags an "
            f"image, whose shares it cannot mix; leave {name} out."
        )
    if label.ndim == 1:
        label = jax.nn.one_hot(label, num_classes, dtype=jnp.float32)
    if label.ndim != 2 or label.shape[1] != num_classes:
        raise ValueError(
            f"Labels of shape {label.shape} do not fit num_classes={num_classes}: "
            "pass class indices [B] or one row per image [B, num_classes]."
        )
    return {"image": image, "label": label.astype(jnp.float32)}


def _partner(rows: Shaped[Array, "B ..."], partner: Partner) -> Shaped[Array, "B ..."]:
    other = jnp.roll(rows, 1, axis=0) if partner == Partner.ROLL else rows[::-1]
    # Without this the partitioner may hold all rows on every device.
    return pin_batch(other)


def _check(op: Mixup | CutMix) -> None:
    name = type(op).__name__
    if op.num_classes is not None and op.num_classes < 1:
        raise ValueError(
            f"{name}.num_classes={op.num_classes}: use the number of classes of the "
            "head, which the mixed labels get."
        )
    if op.alpha < 0:
        raise ValueError(f"{name}.alpha={op.alpha}: use 0 (mixes nothing) or more.")
