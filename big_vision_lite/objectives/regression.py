"""Regression of standardised targets: squared, absolute or Huber's loss."""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from big_vision_lite.messages import some
from big_vision_lite.types import Batch, Forward, Logits, Objective

# B images, N training images, T targets

# Below this share of the largest value, float32 (24 bits) keeps less than a hundredth
# of a standard deviation.
SMALLEST_SPREAD = 1e-5


class RegressionLoss(enum.StrEnum):
    """The loss of a difference d of standardised numbers.

    SQUARED   d ** 2
    ABSOLUTE  |d|, for targets with outliers: the median is fitted
    HUBER     d ** 2 / 2 up to one standard deviation, then |d| - 1/2
              (doi:10.1214/aoms/1177703732)
    """

    SQUARED = "squared"
    ABSOLUTE = "absolute"
    HUBER = "huber"


@dataclasses.dataclass(kw_only=True)
class Regression(Objective):
    """A loss of the logits [B, T] against standardised targets [B, T], mean over T.

    Targets are standardised by `mean` and `std`, those of the training targets
    (`fitted` measures them), so that logits are of size 1 whatever the units; a squared
    loss of 1 is that of the mean. `names` are the targets', units included.
    """

    logits: ClassVar[Logits | None] = Logits.NONE
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loss: RegressionLoss = RegressionLoss.SQUARED

    def __post_init__(self) -> None:
        sizes = len(self.names), len(self.mean), len(self.std)
        if len(set(sizes)) > 1 or not self.names:
            raise ValueError(
                f"Regression has {sizes[0]} names, {sizes[1]} values of mean and "
                f"{sizes[2]} of std; give each target one, as "
                "Regression.fitted(table.targets, table.class_names) does."
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(
                f"Regression(mean={self.mean}, std={self.std}): these are finite "
                "numbers, std above 0."
            )

    @classmethod
    def fitted(
        cls,
        targets: np.ndarray,
        names: Sequence[str],
        loss: RegressionLoss = RegressionLoss.SQUARED,
    ) -> "Regression":
        """Returns the objective that standardises by training `targets` [N, T].

        Raises:
            ValueError: a target has one value only, or differs only in digits that
                float32 does not keep.
        """
        exact = np.asarray(targets, np.float64)
        mean, std = exact.mean(axis=0), exact.std(axis=0)
        largest = np.abs(exact).max(axis=0)
        flat = [
            f"{name} ({low:g} to {high:g})"
            for name, low, high, spread, most in zip(
                names, exact.min(axis=0), exact.max(axis=0), std, largest, strict=True
            )
            if spread <= SMALLEST_SPREAD * most
        ]
        if flat:
            raise ValueError(
                f"The training targets {some(flat)} do not differ, or only in digits "
                "that float32 does not keep. Leave such a column out, or subtract a "
                "constant from it in the table."
            )
        return cls(
            names=tuple(names),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            loss=loss,
        )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        if "target" not in batch:
            raise ValueError(
                f"Regression needs a target [B, {len(self.names)}], but the batch has "
                f"{', '.join(sorted(batch))}; give a source with numbers, such as "
                'Table(kind="numbers", ...).'
            )
        target = jnp.asarray(batch["target"]).astype(jnp.float32)
        self.check(outputs, target)
        wanted = (target - jnp.float32(self.mean)) / jnp.float32(self.std)
        distance = jnp.abs(outputs["logits"].astype(jnp.float32) - wanted)
        match self.loss:
            case RegressionLoss.SQUARED:
                losses = distance**2
            case RegressionLoss.ABSOLUTE:
                losses = distance
            case RegressionLoss.HUBER:
                losses = jnp.where(distance < 1, distance**2 / 2, distance - 0.5)
        return losses.mean(axis=-1), {"absolute_error": distance.mean(axis=-1)}

    def predictions(self, logits: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """Returns the predicted numbers in the units of the targets."""
        return logits * jnp.float32(self.std) + jnp.float32(self.mean)

    def in_head(
        self, variables: Mapping[str, np.ndarray], heads: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Returns `variables` whose `heads` give predictions in their own units.

        For formats that know no mean and deviation: kernel and bias take them in.
        """
        std, mean = (np.array(x, np.float64) for x in (self.std, self.mean))
        found = dict(variables)
        for head in heads:
            if f"{head}/kernel" in found:
                kernel, bias = found[f"{head}/kernel"], found[f"{head}/bias"]
                found[f"{head}/kernel"] = (kernel * std).astype(kernel.dtype)
                found[f"{head}/bias"] = (bias * std + mean).astype(bias.dtype)
        return found

    def check(self, outputs: dict[str, Any], target: Array) -> None:
        """Raises ValueError unless there are logits and targets of the right width."""
        count = len(self.names)
        width = outputs["logits"].shape[-1]
        if width != count:
            raise ValueError(
                f"The model's head has {width} outputs for {count} targets "
                f"({some(self.names)}); use --config.model.head.num_classes={count}."
            )
        if target.shape[1:] != (count,):
            raise ValueError(
                f"Targets have the shape {target.shape}, and the objective {count} "
                f"names ({some(self.names)}); name the targets of the source, in its "
                "order."
            )
