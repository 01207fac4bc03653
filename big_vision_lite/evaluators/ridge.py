"""Ridge regression on features for many penalties, and nested choices of shots.

Follows big_vision's few-shot protocol (arXiv:2205.01580, section 3): regression of
targets -1 and +1 on standardised features, solved by one eigendecomposition.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

# N training images, M images, D features and one constant, C classes, R rank.
SIGMA_FLOOR = 1e-5
# The feature that acts as bias, so large that the penalty hardly affects it.
CONSTANT = 100.0
CHUNK_ROWS = 8192


def shuffled_classes(
    labels: Int[np.ndarray, " N"], num_classes: int, seed: int
) -> list[Int[np.ndarray, " n"]]:
    """Returns each class's image indices in random order; k shots are the first k.

    With the same seed, 5 shots therefore include the 1-shot images.
    """
    generator = np.random.default_rng(seed)
    return [
        generator.permutation(np.flatnonzero(labels == index))
        for index in range(num_classes)
    ]


class Ridge:
    """Ridge regression on `vectors`, factored once for all penalties l2."""

    def __init__(
        self,
        vectors: Float[np.ndarray, "N d"],
        labels: Int[np.ndarray, " N"],
        num_classes: int,
    ):
        x = vectors.astype(np.float64)
        self._mean = x.mean(axis=0)
        self._sigma = x.std(axis=0) + SIGMA_FLOOR
        x = self._standardise(x)
        y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
        solve = primal if x.shape[0] >= x.shape[1] else dual
        self._eigenvalues, self._left, self._right = solve(x, y)

    def weights(self, l2: float) -> Float[np.ndarray, "D C"]:
        """Returns weights of standardised features, then of the constant, at `l2`."""
        return self._left @ (self._right / (self._eigenvalues + l2)[:, None])

    def scores(self, vectors: Float[np.ndarray, "M d"], l2: float) -> np.ndarray:
        """Returns class scores [M, C]; the highest is the prediction."""
        return self._standardise(vectors.astype(np.float64)) @ self.weights(l2)

    def accuracies(
        self,
        vectors: Float[np.ndarray, "M d"],
        labels: Int[np.ndarray, " M"],
        l2s: Sequence[float],
    ) -> Float[np.ndarray, " penalties"]:
        """Returns the accuracy in 0..1 at each penalty."""
        correct = np.zeros(len(l2s), np.int64)
        for x, y in _chunks(vectors, labels):
            projected = self._standardise(x) @ self._left
            for index, l2 in enumerate(l2s):
                weights = self._right / (self._eigenvalues + l2)[:, None]
                predicted = (projected @ weights).argmax(axis=1)
                correct[index] += (predicted == y).sum()
        return correct / len(labels)

    def _standardise(self, x: Float[np.ndarray, "M d"]) -> Float[np.ndarray, "M D"]:
        x = (x - self._mean) / self._sigma
        return np.concatenate([x, np.full((len(x), 1), CONSTANT)], axis=1)


def primal(
    x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N C"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns eigenvalues, left and right factor of the weights (X'X + l2)^-1 X'Y."""
    eigenvalues, vectors = np.linalg.eigh(x.T @ x)
    return eigenvalues, vectors, vectors.T @ (x.T @ y)


def dual(
    x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N C"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns those of X'(XX' + l2)^-1 Y: the same weights, cheaper for N < D."""
    eigenvalues, vectors = np.linalg.eigh(x @ x.T)
    return eigenvalues, x.T @ vectors, vectors.T @ y


def _chunks(
    vectors: Float[np.ndarray, "M d"], labels: Int[np.ndarray, " M"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Standardising copies features in float64: gigabytes for a whole test set.
    for begin in range(0, len(labels), CHUNK_ROWS):
        rows = slice(begin, begin + CHUNK_ROWS)
        yield vectors[rows].astype(np.float64), labels[rows]
