"""Tunes runs on a CPU, and only those: XLA:CPU, malloc, garbage collection.

The loop, the step and the models do not know it; `program` applies it.
"""

import ctypes
import gc
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax


def available() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# By itself XLA:CPU copies both moments of the optimizer: ViT-S/16 needs 176 MB more.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

# Of glibc's malloc.h, with the number of mappings that it allows by default.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MMAP_MAX = 65536
# What malloc comes to by itself once an array of 32 MiB was freed: larger ones are
# mapped, and free memory beyond twice that goes back to the kernel.
MMAP_THRESHOLD = 2**25
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD
# Beyond a step's memory. XLA takes about 100 of these bytes to align it and malloc
# leaves the rest free for others, who may stay: the block then has to move, for its
# pages in vain. malloc gives the smallest free chunk that fits, and one of this size is
# the last that it thinks of; it costs addresses, not memory.
ROOM = 2**20


def library() -> Any:
    """Returns the C library if its malloc can be told what to keep, or None.

    It is left alone where the user has chosen, by MALLOC_... or GLIBC_TUNABLES.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def set_up() -> None:
    """Makes threads share malloc pools, and XLA:CPU run in the calling thread.

    To be called before JAX looks at its devices. By default glibc gives nearly every
    thread a pool of its own, eight to a core, and each keeps what compiling has left in
    it. Here there is one to a core and two more: with fewer, the threads that compute
    search what compiling has left in the main thread's, 4 % of a ViT's step. Only that
    pool can hold what is as large as a step's memory. Input pipelines have threads of
    their own, whatever the main one does.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = library()
    if libc is not None:
        libc.mallopt(M_ARENA_MAX, len(os.sched_getaffinity(0)) + 2)


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Block:
    """A block of host memory of `size` bytes that keeps its pages while it is free."""

    def __init__(self, libc: Any, size: int):
        self._libc = libc
        self._size = size
        self._address: int | None = None
        self._resident = 0  # bytes, when memory was last trimmed, or later if less

    def hold(self) -> None:
        """Allocates the block, so that no other allocation can occupy it."""
        # In the heap and not mapped, because only there its pages outlive `free`; and
        # no `free` at the end of the heap may take them away.
        self._libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        self._libc.mallopt(M_TRIM_THRESHOLD, -1)
        self._libc.mallopt(M_MMAP_MAX, 0)
        try:
            self._address = self._libc.malloc(self._size)
        finally:
            self._libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        # Something small may have come first, so that XLA went elsewhere, or this has
        # to. The pages of what is free then go back, and those that compiling has left.
        now = resident()
        if now > self._resident + self._size // 2:
            self._libc.malloc_trim(0)
            now = self._resident = resident()
        self._resident = min(self._resident, now)

    def free(self) -> None:
        """Frees the block but keeps its pages for the next allocation of this size."""
        # In this order: an interrupt in between must not have it freed twice.
        address, self._address = self._address, None
        self._libc.free(address)

    def give_back(self) -> None:
        """Frees the memory, and returns its pages to the kernel."""
        self._libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        self.free()
        self._libc.malloc_trim(0)


class SteadyStep:
    """A jitted step, compiled at its first call, whose memory stays its own.

    XLA:CPU asks for all temporaries of a call at once and frees them after it; the
    kernel takes the pages back, and clears as many for the next call: a sixth of the
    CPU time of a ViT's step. Here a block of that size is held between calls and free
    while one lasts, so that XLA finds the same pages again. On other devices, on
    several in one process, without glibc or where the user has configured it, and up to
    32 MiB, which malloc keeps by itself, it only calls.

    `saving()` says whether other threads write a checkpoint: what they take of the
    block in the moment before the step does would have the step take as much elsewhere,
    so that it goes back before each such step.

    Python's garbage collector leaves out what there was when the step was compiled:
    tracing leaves so many objects that a full collection took 80 ms in the midst of a
    save (`fashion_mnist.py`, 2 cores).
    """

    def __init__(
        self,
        jitted: Any,
        mesh: jax.sharding.Mesh,
        saving: Callable[[], bool] | None = None,
    ):
        self._jitted = jitted
        self._saving = saving
        self._compiled: Any = None
        self._block: Block | None = None
        self._froze = False
        local = mesh.local_devices
        self._keeps = len(local) == 1 and local[0].platform == "cpu"

    def __call__(self, *arguments: Any) -> Any:
        """Calls the step; where the memory is kept, it returns when all is computed."""
        compiled = self.compile(*arguments)
        if self._saving is not None and self._saving():
            self.give_back()
        if self._block is None:
            return compiled(*arguments)
        self._block.free()
        try:
            # XLA has the memory until all is computed.
            return jax.block_until_ready(compiled(*arguments))
        finally:
            self._block.hold()

    def trace(self, *arguments: Any) -> Any:
        """Traces the jitted step, as it does by itself."""
        return self._jitted.trace(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """Lowers the jitted step, as it does by itself."""
        return self._jitted.lower(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """Returns the compiled step, of arrays or their shapes.

        Compiles at the first call, and then takes the memory.
        """
        if self._compiled is None:
            self._compiled = self.lower(*arguments).compile()
            # Not inside another training, which has frozen its own.
            if not gc.get_freeze_count():
                gc.collect()
                gc.freeze()
                self._froze = True
            libc = library() if self._keeps else None
            if libc is not None:
                size = self._compiled.memory_analysis().temp_size_in_bytes
                if size > MMAP_THRESHOLD:
                    self._block = Block(libc, size + ROOM)
                    self._block.hold()
        return self._compiled

    def give_back(self) -> None:
        """Returns the memory to the kernel until after the next call."""
        if self._block is not None:
            self._block.give_back()

    def close(self) -> None:
        """Gives the memory back, and all objects to the garbage collector."""
        self.give_back()
        if self._froze:
            gc.unfreeze()
            self._froze = False
