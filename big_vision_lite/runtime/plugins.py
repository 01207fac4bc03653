"""Hides the compilers of absent accelerators from JAX.

libtpu and the CUDA wheels also compile for machines that are not present (`targets`). A
process that computes on this machine does not need them, and they are not silent: JAX
loads all that is installed, prints a dozen lines and a trace, and goes on.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import types
from typing import Any

# The environment variable, set for a process that compiles for absent machines.
WANTED = "BIG_VISION_LITE_COMPILERS"
CUDA_WHEELS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def hide_without_devices(root: pathlib.Path = pathlib.Path("/")) -> None:
    """Hides from JAX the compilers of devices that this machine does not have.

    Call it before JAX is imported: JAX's modules load those of the CUDA wheel.
    """
    if os.environ.get(WANTED) or "jax" in sys.modules:
        return
    if not has_nvidia(root):
        for wheel, plugin in zip(CUDA_WHEELS, CUDA_PLUGINS, strict=True):
            if importable(wheel):
                # JAX warns of a plugin that it cannot import, not of an empty one.
                silent: Any = types.ModuleType(plugin)
                silent.initialize = lambda: None
                sys.modules.setdefault(plugin, silent)
            _hide(wheel)
    if not has_tpu(root):
        _hide("libtpu")


def has_nvidia(root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Returns whether this machine has an NVIDIA GPU or its driver."""
    patterns = ("dev/nvidia*", "dev/dxg", "proc/driver/nvidia")
    return any(any(root.glob(pattern)) for pattern in patterns)


def has_tpu(root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Returns whether this machine has a TPU."""
    patterns = ("dev/accel*", "dev/vfio/[0-9]*")
    return any(any(root.glob(pattern)) for pattern in patterns)


def importable(name: str) -> bool:
    """Returns whether a module exists, without importing it."""
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def compilers_installed() -> bool:
    """Returns whether the compilers of TPUs and GPUs are installed, hidden or not."""
    try:
        for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt"):
            importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _hide(name: str) -> None:
    # None makes Python raise ModuleNotFoundError on import.
    sys.modules.setdefault(name, None)  # pyright: ignore[reportArgumentType]
