"""1x1 convolutions as what they are: matrix products."""

import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def pointwise(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]
) -> Float[Array, "*rows O"]:
    """Returns x @ kernel, with a gradient that XLA:CPU is quick at.

    The kernel's gradient is a product over all rows, of which XLA transposes the first
    operand and, on the way, computes again all that led to it, row by row out of the
    cache. By itself the gradient of the output comes first; here the narrower operand
    does. CPU-seconds of ResNet-50's step over timm's: 1.38 instead of 1.68 (batch 4,
    224 px, float32, 2 cores, medians of 6 rounds).
    """
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    over_rows = ((rows, rows), ((), ()))
    if kernel.shape[0] <= kernel.shape[1]:
        of_kernel = jax.lax.dot_general(x, gradient, over_rows)
    else:
        of_kernel = jax.lax.dot_general(gradient, x, over_rows).T
    return gradient @ kernel.T, of_kernel


pointwise.defvjp(_forward, _backward)
