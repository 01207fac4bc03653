"""Numbers that show whether features collapse: to one vector, or to few directions.

An objective without labels returns them as metrics, so they stand on every log line.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Below these, all images have nearly the same features.
SMALLEST_SD = 0.02
SMALLEST_RANK = 1.2
# The metrics that they limit.
LIMITS = ("feature_sd", "effective_rank")


def spread(features: Float[Array, "B D"]) -> dict[str, Float[Array, ""]]:
    """Returns {"feature_sd", "effective_rank"} of the features of the whole batch.

    feature_sd is the deviation over the batch of unit vectors times sqrt(D): 1 where
    they point everywhere alike, 0 where all are the same. effective_rank, from 1 to D,
    is the number of directions that the centred features fill, (sum e)^2 / sum e^2 of
    the eigenvalues e of their covariance, which needs none of them: RankMe
    (arXiv:2210.02885) with another entropy. OnlineProbe gives RankMe itself.
    """
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    unit = x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
    unit = unit - unit.mean(axis=0)
    sd = jnp.sqrt(jnp.square(unit).sum(axis=1).mean())
    covariance = jnp.einsum("bi,bj->ij", unit, unit) / len(unit)
    total = jnp.square(jnp.trace(covariance))
    rank = total / (jnp.square(covariance).sum() + 1e-12 * total + 1e-30)
    return {"feature_sd": sd, "effective_rank": rank}


def entropy(probabilities: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """Returns the entropy in nats of each distribution."""
    return -(probabilities * jnp.log(probabilities + 1e-12)).sum(axis=-1)
