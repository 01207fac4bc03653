"""Models of other libraries with weights that no wrong mapping can hide behind."""

from typing import Any

import numpy as np


def randomise(module: Any, seed: int) -> Any:
    """Fills every parameter and buffer of a torch module; returns it, in eval mode.

    Scales and layer scales are about 1, variances positive, everything else random
    with sizes that keep the activations of order 1. Counters stay.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                values = _values(name.rpartition(".")[2], tuple(tensor.shape), rng)
                tensor.copy_(torch.from_numpy(values).to(tensor.dtype))
    return module.eval()


def relative_difference(ours: Any, theirs: Any) -> float:
    """Returns max |difference| / max |value|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _values(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if "var" in kind:
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) <= 1 and kind in (
        "weight",
        "gamma",
        "gamma_1",
        "gamma_2",
        "lambda1",
    ):
        values = rng.uniform(0.5, 1.5, shape) * rng.choice((-1, 1), shape)
    elif len(shape) <= 1:
        values = rng.normal(0, 0.3, shape)
    elif "weight" in kind and shape[0] != 1:
        values = rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
    else:  # tokens and positions
        values = rng.normal(0, 0.5, shape)
    return np.asarray(values, np.float32)
