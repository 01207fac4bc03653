"""Scores of each class by itself, and their means: no class counts for more."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, Shaped

from big_vision_lite.runtime import files
from big_vision_lite.types import Logits

COLUMNS = ("step", "class", "count", "correct", "accuracy")

# N images, C classes


def balanced_scores(
    rows: Mapping[str, np.ndarray], num_classes: int, logits: Logits | None
) -> dict[str, float]:
    """Returns {"balanced_accuracy"}, with several labels "mean_per_class_recall", too.

    Of one label an image it is the mean over classes of the share of their images that
    are predicted as theirs (the mean recall of classes; scikit-learn's
    balanced_accuracy_score). Of several it is the mean over classes of the mean of two
    shares: images that have the class and are predicted to (the recall), and images
    that do not have it and are predicted not to; a class is predicted from a
    probability of 0.5. Classes that no image has, or every one, are left out. Nothing
    if several labels come with a softmax, which predicts one class, or as tags.
    """
    labels = rows["label"]
    if labels.ndim == 1:
        count, correct = hits(labels, rows["predicted"], num_classes)
        there = count > 0
        return {"balanced_accuracy": float(np.mean(correct[there] / count[there]))}
    if logits != Logits.SIGMOID or "ranking" not in rows:
        return {}
    has, predicted = labels > 0, rows["ranking"] > 0
    there = has.any(axis=0) & ~has.all(axis=0)
    if not there.any():
        return {}
    has, predicted = has[:, there], predicted[:, there]
    recall = (has & predicted).sum(axis=0) / has.sum(axis=0)
    specificity = (~has & ~predicted).sum(axis=0) / (~has).sum(axis=0)
    return {
        "balanced_accuracy": float(np.mean((recall + specificity) / 2)),
        "mean_per_class_recall": float(np.mean(recall)),
    }


def hits(
    labels: Shaped[np.ndarray, "N ..."],
    predicted: Int[np.ndarray, " N"],
    num_classes: int,
) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
    """Returns the number of images of each class, and of those predicted as theirs.

    `labels` are int [N], 0 and 1 [N, C], or tags, int [N, K] padded with -1.
    """
    if labels.ndim == 2 and labels.dtype.kind == "i":
        count = np.bincount(labels[labels >= 0], minlength=num_classes)
        hit = (labels == predicted[:, None]).any(axis=1)
    elif labels.ndim == 2:
        count = (labels > 0).sum(axis=0)
        hit = labels[np.arange(len(predicted)), predicted] > 0
    else:
        count = np.bincount(labels, minlength=num_classes)
        hit = labels == predicted
    return count, np.bincount(predicted[hit], minlength=num_classes)


def write(
    path: epath.Path,
    step: int,
    names: Sequence[str],
    labels: Shaped[np.ndarray, "N ..."],
    predicted: Int[np.ndarray, " N"],
) -> None:
    """Appends the rows of `step`; drops those of it or later that a killed run left."""
    count, correct = hits(labels, predicted, len(names))
    rows: list[Sequence[object]] = [COLUMNS]
    if path.exists():
        old = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))[1:]
        rows += [row for row in old if int(row[0]) < step]
    for name, n, c in zip(names, count.tolist(), correct.tolist(), strict=True):
        rows.append((step, name, n, c, c / n if n else ""))
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, files.csv_text(rows))
