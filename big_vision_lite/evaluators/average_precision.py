"""Mean average precision, the score of several labels an image."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from big_vision_lite.messages import some
from big_vision_lite.types import Array, Logits, Objective

# N images, C classes


def ranking(objective: Objective, logits: Array, label: Array) -> dict[str, Array]:
    """Returns {"ranking": scores [B, C]} that order images by each class's probability.

    Nothing for one label an image, and for tags, int [B, K]: they may be of so many
    classes that scores of all images fill the host. Logits order images like their
    sigmoid, and are never all 1.
    """
    if jnp.issubdtype(label.dtype, jnp.integer):
        return {}
    independent = objective.logits == Logits.SIGMOID
    return {"ranking": logits if independent else jax.nn.log_softmax(logits)}


def precision_scores(
    objective: Objective,
    rows: Mapping[str, np.ndarray],
    names: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, float]:
    """Returns {"mean_average_precision"} of rows with a "ranking", else nothing.

    Images without any label count as images of no class for a sigmoid; for a softmax,
    which cannot say that of an image, they are not labelled and are left out.
    """
    if "ranking" not in rows:
        return {}
    scores, labels = rows["ranking"], rows["label"]
    if objective.logits != Logits.SIGMOID:
        labelled = (labels > 0).any(axis=1)
        scores, labels = scores[labelled], labels[labelled]
    mean = mean_average_precision(scores, labels, names, log)
    return {} if mean is None else {"mean_average_precision": mean}


def mean_average_precision(
    scores: Float[np.ndarray, "N C"],
    labels: Shaped[np.ndarray, "N C"],
    names: Sequence[str],
    log: Callable[[str], None],
) -> float | None:
    """Returns the mean of the classes' average precisions, None if none has an image.

    Classes that no image has are left out, which `log` is told.
    """
    there = np.asarray((labels > 0).any(axis=0))
    absent = [name for name, has in zip(names, there, strict=True) if not has]
    if absent:
        log(
            f"the mean average precision leaves out {len(absent)} of {len(names)} "
            f"classes, which no image has: {some(absent)}."
        )
    found = [
        average_precision(scores[:, c], labels[:, c] > 0) for c in np.flatnonzero(there)
    ]
    return float(np.mean(found)) if found else None


def average_precision(
    scores: Float[np.ndarray, " N"], positive: Shaped[np.ndarray, " N"]
) -> float:
    """Returns the sum over thresholds of (recall - recall before) * precision.

    Images of equal scores pass a threshold together, as in scikit-learn's
    average_precision_score: their order would be chance.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    # The last image of each run of equal scores.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0) * precision))
