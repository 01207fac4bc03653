"""Python's garbage collector, kept away from what stays for a whole run."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Leaves all objects that there are out of every collection until the end.

    Tracing leaves so many that a full collection took 80 ms in the midst of a save
    (`fashion_mnist.py`, 2 cores). Inside another one it does nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
