"""Draws what a masked autoencoder makes of held-out images."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from big_vision_lite.models.blocks.patches import unpatchify
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.picture_grid import write_grid
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Array, Batch, Forward, Op, Runner, Source

# Columns of a sheet: hidden, predicted and whole, twice.
COLUMNS = 6
HIDDEN_GREY = 127.0


@dataclasses.dataclass(kw_only=True)
class Reconstructions:
    """Pictures of a MaskedAutoencoder's reconstructions, and their error.

    Writes WORKDIR/<name>/step_<step>.png: in threes the visible patches of an image,
    its hidden patches as predicted, the image, for the first `count` of `source`.
    Scores: rmse, of the pixels of hidden patches in units of 0..255 over all of
    `source`, examples and unreadable. With norm_pix, mean and deviation of each patch
    are the true ones. `ops` None uses the recipe's `preprocess`.
    """

    source: Source
    ops: tuple[Op, ...] | None = None
    count: int = 12
    every_steps: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        if self.count < 1:
            raise ValueError(f"Reconstructions(count={self.count}) draws nothing.")

    def prepare(self, context: Context) -> Runner:
        ops = context.preprocess if self.ops is None else self.ops
        objective: Any = context.objective
        if not callable(getattr(objective, "patches", None)):
            raise ValueError(
                f"{context.name}: Reconstructions draws what MaskedReconstruction "
                f"predicts, and the objective is {type(objective).__name__}; leave the "
                "evaluator out."
            )
        # Pixels are scaled channel by channel; the error is in their units.
        std, mean = (
            jnp.float32(getattr(context.backbone, name)) for name in ("std", "mean")
        )

        def draw(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            outputs = forward(**context.model.inputs(batch))
            masked = outputs["masked"][:, :, None]
            whole = outputs["image"] * std + mean

            def image(patches: Float[Array, "B N P"]) -> Float[Array, "B H W C"]:
                return _as_images(patches, outputs["image"]) * std + mean

            predicted = objective.patches(outputs)
            filled = image(jnp.where(masked, predicted, outputs["patches"]))
            everywhere = jnp.broadcast_to(masked, predicted.shape)
            hidden = _as_images(everywhere, outputs["image"])
            count = hidden.sum(axis=(1, 2, 3))
            error = jnp.square(filled - whole).sum(axis=(1, 2, 3)) / count
            seen = jnp.where(hidden, HIDDEN_GREY, whole)
            return {"error": error, "seen": seen, "filled": filled, "whole": whole}

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            return {"error": draw(forward, batch, rng)["error"]}

        error_step, picture_step = map(context.make_eval_step, (judge, draw))
        where = (self.source, ops, self.batch_size)
        context.check_step(error_step, *where, keys=())

        def run(state: Any) -> dict[str, Any]:
            error = context.rows(error_step, state, *where)["error"]
            counts = context.counts(self.source, len(error))
            drawn = context.rows(picture_step, state, *where, most=self.count)
            if jax.process_index() == 0:
                images = [drawn[name] for name in ("seen", "filled", "whole")]
                sheet = np.stack(images, axis=1).reshape(-1, *images[0].shape[1:])
                path = context.workdir / context.name / f"step_{int(state.step):08}.png"
                write_grid(sheet, path, columns=COLUMNS)
            mean_square = math.fsum(error.tolist()) / len(error)
            return {"rmse": math.sqrt(mean_square), **counts}

        return run


def _as_images(
    patches: Shaped[Array, "B N P"], image: Float[Array, "B H W C"]
) -> Shaped[Array, "B H W C"]:
    """Puts patches in rows together to images of the size of `image`."""
    channels = image.shape[-1]
    side = math.isqrt(patches.shape[-1] // channels)
    grid = (image.shape[1] // side, image.shape[2] // side)
    return unpatchify(patches.reshape(len(patches), *grid, -1), channels)
