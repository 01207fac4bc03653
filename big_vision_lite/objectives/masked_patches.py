"""Self-distillation of single patches that the student does not see (iBOT)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Rectangles drawn for each image; what they leave is filled by single patches.
RECTANGLES = 16
SMALLEST_AREA = 4
LARGEST_ASPECT = 1 / 0.3


@dataclasses.dataclass(kw_only=True)
class MaskedPatches:
    """Which patches of the global views the student predicts, and with what weight.

    After iBOT (arXiv:2111.07832, section 3): a share of the views, `views`, has hidden
    patches; their ratios are spread evenly over the batch from `ratio_min` to
    `ratio_max`; rectangles are hidden first, of 4 patches or more and an aspect between
    0.3 and 1 / 0.3. `weight` is that of the loss at hidden patches. `visible_weight` is
    that at all others, as TIPSv2 adds it (arXiv:2604.12012). `progress_start` is the
    fraction of the run at which the weights begin; they grow linearly to their whole
    at `progress_end`: targets of an untrained teacher mean nothing.
    """

    weight: float = 1.0
    visible_weight: float = 0.0
    views: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 0.5
    progress_start: float = 0.0
    progress_end: float = 0.0

    def __post_init__(self) -> None:
        if min(self.weight, self.visible_weight) < 0:
            raise ValueError(
                f"weight={self.weight} and visible_weight={self.visible_weight} must "
                "not be below 0."
            )
        ratios = 0 < self.ratio_min <= self.ratio_max < 1
        if not (ratios and 0 < self.views <= 1):
            raise ValueError(
                f"views={self.views}, ratio_min={self.ratio_min}, ratio_max="
                f"{self.ratio_max}: shares with 0 < views <= 1 and 0 < ratio_min <= "
                "ratio_max < 1."
            )
        if not 0 <= self.progress_start <= self.progress_end <= 1:
            raise ValueError(
                f"progress_start={self.progress_start}, progress_end="
                f"{self.progress_end}: fractions of the run, in this order."
            )

    def draw(
        self, rng: Array, count: int, grid: tuple[int, int]
    ) -> tuple[Int[Array, "V n"], Bool[Array, "V n"], Bool[Array, "V N"]]:
        """Returns places to predict, which of them are hidden, and all hidden patches.

        The places, indices into the N patches of each of `count` views, are the
        `ratio_max` * N first to be hidden, or all of them if visible ones count.
        """
        number = grid[0] * grid[1]
        most = int(number * self.ratio_max)
        if most < 1:
            raise ValueError(
                f"ratio_max={self.ratio_max} of {number} patches hides none: use a "
                f"ratio above {1 / number:.3g}, smaller patches or larger images."
            )
        to_views, to_order = jax.random.split(rng)
        masked = max(1, round(count * self.views))
        ratios = jnp.linspace(self.ratio_min, self.ratio_max, masked)
        # Rounding of a ratio must not hide one patch less; at least one is hidden.
        hidden = jnp.maximum(1, jnp.floor(ratios * number + 1e-4)).astype(jnp.int32)
        hidden = jnp.zeros(count, jnp.int32).at[:masked].set(hidden)
        hidden = jax.random.permutation(to_views, hidden)[:, None]
        order = block_order(to_order, hidden[:, 0], grid)
        places = order if self.visible_weight else order[:, :most]
        rank = jnp.argsort(order, axis=1)
        return places, jnp.arange(places.shape[1]) < hidden, rank < hidden

    def weights(
        self, hidden: Bool[Array, "V n"], progress: Array
    ) -> Float[Array, "V n"]:
        """Returns the weight of each place in its view's loss.

        Hidden places of a view share `weight`, visible ones `visible_weight`.
        """
        visible = ~hidden
        weights = self.weight * hidden / jnp.maximum(
            hidden.sum(axis=1, keepdims=True), 1
        ) + self.visible_weight * visible / jnp.maximum(
            visible.sum(axis=1, keepdims=True), 1
        )
        if self.progress_end:
            length = max(self.progress_end - self.progress_start, 1e-9)
            begun = (progress - self.progress_start) / length
            weights = weights * jnp.clip(begun, 0, 1)
        return weights


def block_order(
    rng: Array, hidden: Int[Array, " V"], grid: tuple[int, int]
) -> Int[Array, "V N"]:
    """Returns the patches of each view in the order in which they are hidden.

    Rectangles come first, one after the other, each row by row, so that the first
    `hidden` patches are whole rectangles but the last; single patches follow.
    """
    rows, columns = grid
    number, count = rows * columns, len(hidden)
    keys = jax.random.split(rng, 5)
    shape = (count, RECTANGLES)
    most = jnp.maximum(hidden, SMALLEST_AREA)[:, None]
    area = SMALLEST_AREA + jax.random.uniform(keys[0], shape) * (most - SMALLEST_AREA)
    turn = math.log(LARGEST_ASPECT)
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=-turn, maxval=turn))
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
    top = jnp.floor(jax.random.uniform(keys[2], shape) * (rows - height + 1))
    left = jnp.floor(jax.random.uniform(keys[3], shape) * (columns - width + 1))
    row, column = jnp.arange(number) // columns, jnp.arange(number) % columns
    above, beside = row - top[..., None], column - left[..., None]
    inside = (above >= 0) & (above < height[..., None])
    inside &= (beside >= 0) & (beside < width[..., None])
    first = jnp.where(inside.any(axis=1), inside.argmax(axis=1), RECTANGLES)
    within = jnp.where(
        first < RECTANGLES,
        jnp.arange(number) / number,
        jax.random.uniform(keys[4], (count, number)),
    )
    return jnp.argsort(first + within, axis=1)
