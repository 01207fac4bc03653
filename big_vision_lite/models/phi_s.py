"""PHI-S: features standardised by a rotation that gives every dimension variance 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from big_vision_lite.models.blocks import layers


def hadamard(size: int) -> Int[np.ndarray, "size size"]:
    """Returns a matrix of 1 and -1, int8, whose rows are orthogonal to each other.

    Paley's first construction for a prime q = 3 mod 4 gives q + 1, Sylvester's doubles
    it: 192, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 2048 and many more.

    Raises:
        ValueError: neither construction gives the size; names the nearest that they do.
    """
    found = _core(size)
    if found is None:
        near = (size + step * sign for step in range(1, size + 4) for sign in (-1, 1))
        nearest = next(n for n in near if n > 0 and _core(n) is not None)
        raise ValueError(
            f"There is no Hadamard matrix of size {size} here, so PHI-S cannot "
            f"standardise features of {size} dimensions; the nearest size is "
            f"{nearest}. Compare such a teacher by its cosine: --config.model."
            "standardise_steps=0 --config.objective.distance=cosine."
        )
    matrix, doublings = found
    for _ in range(doublings):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix.astype(np.int8)


class PhiS(nn.Module, kw_only=True):
    """Maps features [B, D] to (features - mean) W, float32, each of variance 1.

    W = U H / sqrt(mean e), with the eigenvectors U and eigenvalues e of the features'
    covariance and H a Hadamard matrix scaled to be orthogonal (arXiv:2410.01680,
    section 3.2): it turns and scales as a whole, so distances keep their proportions.
    Mean and covariance are those of the first `sample_steps` batches of training, in
    the collection "standards"; until then W only scales.
    """

    sample_steps: int

    def __post_init__(self) -> None:
        layers.check_positive(sample_steps=self.sample_steps)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Float[Array, "B D"], train: bool) -> Array:
        size = features.shape[-1]
        turn = hadamard(size)
        x = jax.lax.stop_gradient(features).astype(jnp.float32)
        steps = self.variable("standards", "steps", jnp.zeros, (), jnp.int32)
        mean = self.variable("standards", "mean", jnp.zeros, (size,), jnp.float32)
        covariance = self.variable("standards", "covariance", jnp.zeros, (size, size))
        kernel = self.variable("standards", "kernel", jnp.eye, size)
        if train and not self.is_initializing():
            # Not computed any more once the sample is complete.
            steps.value, mean.value, covariance.value, kernel.value = jax.lax.cond(
                steps.value < self.sample_steps,
                lambda held: _observe(held, x, turn, self.sample_steps),
                lambda held: held,
                (steps.value, mean.value, covariance.value, kernel.value),
            )
        return (x - mean.value) @ kernel.value


def _observe(
    held: tuple[Array, Array, Array, Array],
    x: Float[Array, "B D"],
    turn: np.ndarray,
    sample_steps: int,
) -> tuple[Array, Array, Array, Array]:
    """Adds a batch to mean and covariance; turns, too, when it is the last."""
    steps, mean, covariance, _ = held
    of_batch = x.mean(axis=0)
    share = 1 / (steps + 1)
    apart = of_batch - mean
    centred = x - of_batch
    inside = jnp.einsum("bi,bj->ij", centred, centred, precision="highest") / len(x)
    # Chan's update: sums of squares would lose the variance beside a large mean.
    covariance = (1 - share) * covariance + share * inside
    covariance = covariance + share * (1 - share) * jnp.outer(apart, apart)
    mean = mean + share * apart
    kernel = jax.lax.cond(
        steps + 1 == sample_steps,
        lambda: standardiser(covariance, turn),
        lambda: jnp.eye(len(mean)) * _scale(covariance),
    )
    return steps + 1, mean, covariance, kernel


def standardiser(
    covariance: Float[Array, "D D"], turn: np.ndarray
) -> Float[Array, "D D"]:
    """Returns W that gives features of this covariance the variance 1 everywhere."""
    vectors = jnp.linalg.eigh(covariance)[1]
    orthogonal = jnp.asarray(turn, jnp.float32) / np.sqrt(len(turn))
    turned = jnp.matmul(vectors, orthogonal, precision="highest")
    return turned * _scale(covariance)


def _scale(covariance: Float[Array, "D D"]) -> Float[Array, ""]:
    return jax.lax.rsqrt(jnp.trace(covariance) / len(covariance) + 1e-12)


def _core(size: int) -> tuple[np.ndarray, int] | None:
    """Returns a matrix and how often it is to be doubled, None if there is none."""
    doublings = 0
    while size > 2:
        if size % 4 == 0 and _is_prime(size - 1):
            return _paley(size - 1), doublings
        if size % 2:
            return None
        size, doublings = size // 2, doublings + 1
    if size < 1:
        return None
    return np.array([[1, 1], [1, -1]])[:size, :size], doublings


def _paley(q: int) -> np.ndarray:
    """Returns the matrix of size q + 1 of a prime q = 3 mod 4."""
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    skew = np.zeros((q + 1, q + 1), int)
    skew[0, 1:], skew[1:, 0] = 1, -1
    index = np.arange(q)
    skew[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return skew + np.eye(q + 1, dtype=int)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))
