"""Tests compile quickly rather than well, but for those that ask for the latter."""

import contextlib
import os
from collections.abc import Iterator

QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"


@contextlib.contextmanager
def well() -> Iterator[None]:
    """Compiles as users do, here and in the processes that are started meanwhile."""
    import jax

    chosen = os.environ.pop(QUICKLY)
    jax.config.update(QUICKLY.lower(), False)
    # What is compiled already, quickly, is not compiled again otherwise.
    jax.clear_caches()
    try:
        yield
    finally:
        os.environ[QUICKLY] = chosen
        jax.config.update(QUICKLY.lower(), True)
        jax.clear_caches()
