"""Imports torchvision beside a torch that its compiled operators were not built for.

PyPI's torchvision is built for CUDA. Beside a torch for the CPU its operators (for
detection) do not load, and then it refuses to be imported at all, and timm with it.
Models and transforms need none of them.
"""

import sys
from typing import Any

# Declared, not implemented: torchvision only describes them when it is imported.
OPERATORS = ("nms", "qnms")
_declared: list[Any] = []


def import_torchvision() -> None:
    """Makes `import torchvision` and `import timm` work where they are installed.

    Where they are not, their own imports say so.
    """
    if "torchvision" in sys.modules:
        return
    try:
        import torch
        import torchvision
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou) -> Tensor")
        _declared.append(library)  # They last as long as it does.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        import torchvision  # noqa: F401
