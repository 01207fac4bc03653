"""Nearest neighbours among labelled features, weighted as in DINOv2's evaluation."""

import numpy as np
from jaxtyping import Float, Int

# As in the code of DINO and DINOv2 (arXiv:2104.14294), after arXiv:1805.01978.
TEMPERATURE = 0.07
CHUNK_ROWS = 1024

# N training images, M images, D features, C classes


def knn_accuracy(
    vectors: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    test_vectors: Float[np.ndarray, "M D"],
    test_labels: Int[np.ndarray, " M"],
    num_classes: int,
    neighbours: int = 20,
) -> float:
    """Returns the share of test images whose neighbours vote for their class.

    The `neighbours` of the largest cosine similarity s vote with weight exp(s / 0.07).
    """
    known, asked = unit(vectors), unit(test_vectors)
    count = min(neighbours, len(known))
    one_hot = np.eye(num_classes, dtype=np.float32)
    correct = 0
    for begin in range(0, len(asked), CHUNK_ROWS):
        rows = slice(begin, begin + CHUNK_ROWS)
        similarity = asked[rows] @ known.T
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        weight = np.exp(np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE)
        votes = (weight[:, :, None] * one_hot[labels[nearest]]).sum(axis=1)
        correct += int((votes.argmax(axis=1) == test_labels[rows]).sum())
    return correct / len(test_labels)


def unit(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Returns the vectors divided by their length, float32; a zero vector stays."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)


def rankme(vectors: Float[np.ndarray, "N D"]) -> float:
    """Returns RankMe (arXiv:2210.02885): exp of the entropy of the singular values.

    From 1, where all features lie on one line, to min(N, D).
    """
    values = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))
