"""Python's garbage collector, kept away from what stays for a whole run."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Leaves all objects that there are out of every collection until the end.

    Tracing leaves a million of them, through which each full collection goes: 80 ms in
    the midst of a step or a save. Inside another one it does nothing.
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
