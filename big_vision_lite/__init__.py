"""big_vision_lite pretrains ResNets and ViTs on large labelled datasets with JAX.

On TPU or GPU: ml-collections config files, sharded training (`jax.jit` over a named
mesh), Orbax checkpoints, few-shot and fine-tune transfer evaluators, TPU VM launch
scripts, checkpoint conversion to PyTorch; small enough to read.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from big_vision_lite.runtime import plugins

if TYPE_CHECKING:
    from big_vision_lite.runs.inference import LoadedModel

__version__ = "0.1.0"

# Before anything imports JAX.
plugins.hide_without_devices()


def load(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    allowed_modules: Sequence[str] = (),
    part: str = "",
) -> "LoadedModel":
    """Loads a model that maps uint8 images to pooled features and class probabilities.

    `path` is a run folder, a checkpoints folder, one step folder, or weights of another
    library: a file, a folder with config.json, or "hub:organisation/name", which is
    downloaded. Of a file with several models `part` is one, by the beginning of its
    names ("teacher"). What is assumed of foreign weights is printed. The model runs on
    batches of at most `batch_size` images, on all devices of this process. Your own
    classes are imported from `allowed_modules` only.

    Raises:
        FileNotFoundError: neither is at `path`; lists the places searched.
        ValueError: the weights are damaged, have an unknown format, or need a class
            outside the allowed modules.
    """
    from big_vision_lite.runs import inference

    return inference.load(
        path, batch_size=batch_size, allowed_modules=allowed_modules, part=part
    )
