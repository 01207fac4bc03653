"""Tunes runs on a CPU, and only those: XLA:CPU, malloc, garbage collection.

Loop, step and models do not know of it; `startup` and `training.program` apply it.
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


# Without it XLA:CPU copies both moments of the optimizer: 176 MB more for ViT-S/16.
COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}

# Constants of glibc's malloc.h, and its default maximum number of mappings.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MMAP_MAX = 65536
# The thresholds that malloc chooses after an array of 32 MiB was freed: larger ones are
# mapped, and free memory beyond twice that goes back to the kernel.
MMAP_THRESHOLD = 2**25
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD
# Bytes beyond a step's memory. XLA needs about 100 for alignment. If malloc gives the
# rest to another allocation that stays, the block has to move and loses its pages; but
# malloc takes the smallest free chunk that fits, and so one of this size last. It costs
# addresses, not memory.
ROOM = 2**20


def library() -> Any:
    """Returns the C library if its malloc can be configured, else None.

    Returns None, too, if the user configured it by MALLOC_... or GLIBC_TUNABLES.
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
    """Limits malloc's arenas, and makes XLA:CPU run in the calling thread.

    Call it before JAX initialises its devices. By default glibc gives nearly every
    thread an arena, up to eight per core, and each keeps memory left from compiling.
    Here there are as many as cores plus two: with fewer, the compute threads search the
    chunks left in the main thread's arena, 4 % of a ViT's step. Only that arena can
    hold an allocation as large as a step's memory. The input pipeline has its own
    threads, which run while the main one computes.
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
        # In the heap, not mapped, because only there its pages outlive `free`; and
        # `free` at the end of the heap must not return them.
        self._libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        self._libc.mallopt(M_TRIM_THRESHOLD, -1)
        self._libc.mallopt(M_MMAP_MAX, 0)
        try:
            self._address = self._libc.malloc(self._size)
        finally:
            self._libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        # A small allocation may have come first, so that XLA's or this one moved. Then
        # the pages of free memory go back, also those left by compiling.
        now = resident()
        if now > self._resident + self._size // 2:
            self._libc.malloc_trim(0)
            now = self._resident = resident()
        self._resident = min(self._resident, now)

    def free(self) -> None:
        """Frees the block but keeps its pages for the next allocation of this size."""
        # In this order: an interrupt in between must not free it twice.
        address, self._address = self._address, None
        self._libc.free(address)

    def give_back(self) -> None:
        """Frees the block, and returns its pages to the kernel."""
        self._libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        self.free()
        self._libc.malloc_trim(0)


class SteadyStep:
    """A jitted step, compiled at its first call, that keeps the pages of its memory.

    XLA:CPU allocates all temporaries of a call at once and frees them after it; the
    kernel takes the pages back, and clears as many for the next call: a sixth of the
    CPU time of a ViT's step. Here a block of that size is held between calls and free
    during each, and XLA gets the same pages again. No block is held on other devices,
    on several in one process, without glibc, if the user configured malloc, and up to
    32 MiB, which malloc keeps by itself.

    `saving()` returns whether other threads write a checkpoint. They may take a part of
    the block just before a step, which then allocates as much elsewhere; so the block
    is given back before each such step.

    Python's garbage collector ignores objects from before the compilation: tracing
    leaves so many that a full collection took 80 ms during a save (`fashion_mnist.py`,
    2 cores).
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
        """Calls the step; if its memory is kept, waits until all is computed."""
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
        """Traces the jitted step, as its own `trace` does."""
        return self._jitted.trace(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """Lowers the jitted step, as its own `lower` does."""
        return self._jitted.lower(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """Returns the step compiled for arguments that are arrays or their shapes.

        The first call compiles it, and then allocates its memory.
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
        """Returns memory to the kernel, and all objects to the garbage collector."""
        self.give_back()
        if self._froze:
            gc.unfreeze()
            self._froze = False
