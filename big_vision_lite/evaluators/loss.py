"""The training objective's loss and metrics on held-out data."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from big_vision_lite.config import MatchClasses
from big_vision_lite.messages import some
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.training.step import call_objective
from big_vision_lite.types import Array, Batch, Forward, Op, Runner, Source


@dataclasses.dataclass(kw_only=True)
class Loss:
    """Means of the objective's loss and metrics over all examples of `source`.

    Works with any objective. `ops` are the deterministic ops from an example to the
    objective's inputs; None uses the recipe's `preprocess`. Device ops do not run.
    The averaged parameters (EMA), if any, serve as the model and as its teacher. Labels
    are matched to the model's classes as in Classification. Random masks are fixed by
    the run's seed and the ordinal of the batch; per-batch metrics and contrastive
    objectives depend on `batch_size` and on the padding of the last batch. Scores:
    loss, the metrics, examples and unreadable (counts).
    """

    source: Source
    ops: tuple[Op, ...] | None = None
    every_steps: int = 1000
    batch_size: int = 256
    match_classes: MatchClasses = MatchClasses.BY_NAME

    def __post_init__(self) -> None:
        check_fields(self)

    def prepare(self, context: Context) -> Runner:
        ops = context.preprocess if self.ops is None else self.ops
        classes = context.classes(self.source, self.match_classes)

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            count = len(context.class_names)
            if "target" in batch and batch["target"].shape[1] < count:
                raise ValueError(
                    f"{context.name}: {self.source.name(0)} has targets "
                    f"{some(self.source.class_names)}, the model predicts "
                    f"{some(context.class_names)}; name all columns of these."
                )
            batch = classes.translate(batch)
            losses, metrics = call_objective(context.objective, forward, batch, rng)
            found = {"loss": losses, **metrics}
            return {
                name: jnp.broadcast_to(x, losses.shape).astype(jnp.float32)
                for name, x in found.items()
            }

        step = context.make_eval_step(judge)
        where = (self.source, ops, self.batch_size)
        context.check_step(step, *where, keys=())

        def run(state: Any) -> dict[str, Any]:
            rows = context.rows(step, state, *where)
            counts = context.counts(self.source, len(rows["loss"]))
            # fsum is exact, so the number of devices cannot matter.
            sums = {name: math.fsum(x.tolist()) for name, x in rows.items()}
            return {n: x / counts["examples"] for n, x in sums.items()} | counts

        return run
