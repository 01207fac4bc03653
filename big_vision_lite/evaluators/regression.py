"""How well numbers are predicted: R2, MAE, RMSE and Spearman, beside their mean."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from big_vision_lite.messages import some
from big_vision_lite.objectives import regression as objectives
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Array, Batch, Forward, Runner, Source

# N images, T targets


@dataclasses.dataclass(kw_only=True)
class Regression:
    """Errors of the predicted numbers on every image of `source`, in their own units.

    Of one target the scores are r2, mae, rmse and spearman, and the control: r2, mae
    and rmse "_of_mean" of the constant that is the mean of the training targets. Of
    several there is each with the name of the target ("mae/height"), and the means over
    the targets: r2, spearman, and as units differ, mae_in_std and rmse_in_std, in
    standard deviations of the training targets. What is not defined, such as r2 of a
    constant target, is left out, of means too, and said. Also examples and unreadable
    (counts). Targets are matched to the model's by name.
    """

    source: Source
    every_steps: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_fields(self)

    def prepare(self, context: Context) -> Runner:
        objective = context.objective
        if not isinstance(objective, objectives.Regression):
            raise ValueError(
                f"{context.name}: the objective is {type(objective).__name__}, which "
                "predicts no numbers in units; score it with Classification or Loss, "
                "or train with objectives.regression.Regression."
            )
        order = np.array(self._order(objective, context.name))

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            outputs = forward(**context.model.inputs(batch))
            target = batch["target"][:, order]
            objective.check(outputs, target)
            logits = outputs["logits"].astype(jnp.float32)
            return {"predicted": objective.predictions(logits), "target": target}

        step = context.make_eval_step(judge)
        where = (self.source, context.preprocess, self.batch_size)
        context.check_step(step, *where, keys=("target",))

        def run(state: Any) -> dict[str, Any]:
            rows = context.rows(step, state, *where)
            counts = context.counts(self.source, len(rows["target"]))
            scores, undefined = score(rows["predicted"], rows["target"], objective)
            if undefined:
                context.log(
                    f"{context.name}: {some(undefined)} left out: not defined where "
                    "all targets or all predictions are the same."
                )
            return {**scores, **counts}

        return run

    def _order(self, objective: objectives.Regression, name: str) -> list[int]:
        """Returns the place in the source of each of the model's targets."""
        theirs = tuple(self.source.class_names)
        missing = [target for target in objective.names if target not in theirs]
        if missing:
            raise ValueError(
                f"{name} has no target {some(missing)}, which the model predicts; it "
                f"has {some(theirs)}. Name the columns: label={objective.names}."
            )
        return [theirs.index(target) for target in objective.names]


def score(
    predicted: Float[np.ndarray, "N T"],
    target: Float[np.ndarray, "N T"],
    objective: objectives.Regression,
) -> tuple[dict[str, float], list[str]]:
    """Returns the scores by name, and the names of those that are not defined."""
    names = objective.names
    each = {
        name: _of_target(
            predicted[:, place].astype(np.float64),
            target[:, place].astype(np.float64),
            objective.mean[place],
        )
        for place, name in enumerate(names)
    }
    if len(names) == 1:
        found = each[names[0]]
        means = {}
    else:
        found = {f"{k}/{n}": x for n, part in each.items() for k, x in part.items()}
        means = _means(each, dict(zip(names, objective.std, strict=True)))
    defined = {name: x for name, x in found.items() if x is not None}
    return means | defined, [name for name, x in found.items() if x is None]


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns the rank of each value from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def _of_target(
    predicted: Float[np.ndarray, " N"], target: Float[np.ndarray, " N"], mean: float
) -> dict[str, float | None]:
    total = ((target - target.mean()) ** 2).sum()
    scores: dict[str, float | None] = {}
    for suffix, guess in (("", predicted), ("_of_mean", np.full_like(target, mean))):
        error = guess - target
        square = (error**2).sum()
        scores[f"r2{suffix}"] = float(1 - square / total) if total > 0 else None
        scores[f"mae{suffix}"] = float(np.abs(error).mean())
        scores[f"rmse{suffix}"] = float(np.sqrt(square / len(target)))
    ordered = [x - x.mean() for x in (ranks(predicted), ranks(target))]
    length = np.sqrt((ordered[0] ** 2).sum() * (ordered[1] ** 2).sum())
    product = (ordered[0] * ordered[1]).sum()
    scores["spearman"] = float(product / length) if length > 0 else None
    return scores


def _means(
    each: dict[str, dict[str, float | None]], std: dict[str, float]
) -> dict[str, float]:
    """Returns the means over the targets of what is defined, errors in `std`."""
    means = {}
    for kind in next(iter(each.values())):
        has_units = kind.startswith(("mae", "rmse"))
        values = [
            value / (std[name] if has_units else 1)
            for name, part in each.items()
            if (value := part[kind]) is not None
        ]
        if values:
            means[kind + "_in_std" * has_units] = float(np.mean(values))
    return means
