"""What a run depends on beside its recipe and its data: versions, and the machine."""

import contextlib
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

from big_vision_lite import cores

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of this code and of the libraries that decide results."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    found["python"] = platform.python_version()
    root = pathlib.Path(__file__).parents[1]
    # An installed copy lies in no repository, or in that of somebody else.
    if (root / ".git").exists():
        with contextlib.suppress(FileNotFoundError):  # a machine without git
            commit = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                check=False,
            )
            if commit.returncode == 0:
                found["commit"] = commit.stdout.strip()
    return found


def machine() -> dict[str, Any]:
    """Returns what bit-exactness depends on: devices, processes, visible cores."""
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": cores.available(),
    }
