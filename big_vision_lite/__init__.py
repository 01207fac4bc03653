"""big_vision_lite pretrains ResNets and ViTs on large labelled datasets with JAX.

On TPU or GPU: ml-collections config files, pmap/pjit-style sharded training (`jax.jit`
+ `NamedSharding`), Orbax checkpoints, few-shot and fine-tune transfer evaluators, TPU
VM launch scripts, checkpoint conversion to PyTorch; small enough to read.
"""

from big_vision_lite.runtime import plugins

__version__ = "0.1.0"

# Before anything imports JAX.
plugins.hide_without_devices()
