"""The training objective's loss and metrics on held-out data."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite.evaluators.classification import translate
from big_vision_lite.messages import some
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.labels import class_table
from big_vision_lite.training.step import call_objective
from big_vision_lite.types import Array, Batch, Forward, Op, Runner, Source


@dataclasses.dataclass(kw_only=True)
class Loss:
    """Means of the objective's loss and metrics over all examples of `source`.

    Works with any objective. `ops` are the deterministic ops from an example to the
    objective's inputs; None uses the recipe's `preprocess`. Device ops do not run.
    The averaged parameters (EMA), if any, serve as the model and as its teacher. Labels
    are matched to the model's classes by name. Random masks are fixed by the run's seed
    and the ordinal of the batch; per-batch metrics and contrastive objectives depend on
    `batch_size` and on the padding of the last batch. Scores: loss, the metrics,
    examples and unreadable (counts).
    """

    source: Source
    ops: tuple[Op, ...] | None = None
    every_steps: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.every_steps < 0:
            raise ValueError(
                f"Loss(every_steps={self.every_steps}, batch_size={self.batch_size}): "
                "batch_size starts at 1, every_steps at 1, and 0 switches the "
                "evaluator off."
            )

    def prepare(self, context: Context) -> Runner:
        context.check_set(self.source, self.batch_size)
        ops = context.preprocess if self.ops is None else self.ops
        indices = self._indices(context)

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            count = len(context.class_names)
            if "target" in batch and batch["target"].shape[1] < count:
                raise ValueError(
                    f"{context.name}: {self.source.name(0)} has targets "
                    f"{some(self.source.class_names)}, the model predicts "
                    f"{some(context.class_names)}; name all columns of these."
                )
            for key in ("label", "target"):
                if indices is not None and key in batch:
                    values = translate(batch[key], indices, count)
                    batch = {**batch, key: values}
            losses, metrics = call_objective(context.objective, forward, batch, rng)
            found = {"loss": losses, **metrics}
            return {
                name: jnp.broadcast_to(x, losses.shape).astype(jnp.float32)
                for name, x in found.items()
            }

        step = context.make_eval_step(judge)
        context.check_step(step, self.source, ops, self.batch_size, keys=())

        def run(state: Any) -> dict[str, float]:
            read = list(context.rows(step, state, self.source, ops, self.batch_size))
            rows = {n: np.concatenate([r[n] for r in read]) for n in read[0]}
            examples = len(rows["loss"])
            if not examples:
                raise ValueError(
                    f"{context.name}: not one of {len(self.source)} examples could be "
                    "read; look at them with tools/check_dataset.py."
                )
            unreadable = len(self.source) - examples
            if unreadable:
                context.log(
                    f"{context.name}: {unreadable} of {len(self.source)} examples are "
                    "unreadable and not counted; tools/check_dataset.py lists them."
                )
            # fsum is exact, so the number of devices cannot matter.
            return {
                **{n: math.fsum(x.tolist()) / examples for n, x in rows.items()},
                "examples": float(examples),
                "unreadable": float(unreadable),
            }

        return run

    def _indices(self, context: Context) -> Array | None:
        """Returns the model's label for each of the source's, None if they agree."""
        theirs = tuple(self.source.class_names)
        if not theirs or not context.class_names:
            return None
        table = class_table(
            theirs, context.class_names, name=context.name, ours_is="train"
        )
        if table.message is not None:
            context.log(table.message)
        return None if table.is_identity else jnp.asarray(table.indices)
