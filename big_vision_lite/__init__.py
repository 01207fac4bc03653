"""big_vision_lite pretrains ResNets and ViTs on large labelled datasets with JAX.

On TPU or GPU: ml-collections config files, pmap/pjit-style sharded training (`jax.jit`
+ `NamedSharding`), Orbax checkpoints, few-shot and fine-tune transfer evaluators, TPU
VM launch scripts, checkpoint conversion to PyTorch; small enough to read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from big_vision_lite.runtime import plugins

if TYPE_CHECKING:
    from big_vision_lite.runs.inference import LoadedModel

__version__ = "0.1.0"

# Before anything imports JAX.
plugins.hide_without_devices()


def load(
    path: str, *, batch_size: int = 64, allowed_modules: Sequence[str] = ()
) -> "LoadedModel":
    """Loads a model that takes uint8 images and gives features and classes.

    `path` is a run folder, a checkpoints folder, one step folder, or weights of another
    library: a file, a folder with config.json, or "hub:organisation/name", which is
    downloaded. What is assumed of foreign weights is printed. Images go through it in
    batches of at most `batch_size`, on all devices of this process. Classes of your
    own are imported from `allowed_modules` alone.

    Raises:
        FileNotFoundError: there is neither; says what was looked at.
        ValueError: the weights are damaged, in no known format, or need a class that
            may not be imported.
    """
    from big_vision_lite.runs import inference

    return inference.load(path, batch_size=batch_size, allowed_modules=allowed_modules)
