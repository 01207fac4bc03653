"""Models of other libraries with weights that no wrong mapping can hide behind."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy


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


def gray_resnet(levels: Any) -> dict[str, np.ndarray]:
    """Returns a torch ResNet {name: array} of 4 stages that names the gray of an image.

    Feature 0 is 1 + the pixel in 0..1 of a flat image; the largest logit is that of the
    nearest of `levels`, in 0..1.
    """
    arrays: dict[str, np.ndarray] = {}

    def norm(name: str, width: int) -> None:
        arrays[f"{name}.weight"] = np.ones(width, np.float32)
        arrays[f"{name}.bias"] = np.zeros(width, np.float32)
        arrays[f"{name}.running_mean"] = np.zeros(width, np.float32)
        arrays[f"{name}.running_var"] = np.full(width, 1 - 1e-5, np.float32)

    arrays["conv1.weight"] = np.zeros((4, 3, 7, 7), np.float32)
    arrays["conv1.weight"][0, 0, 3, 3] = 1
    norm("bn1", 4)
    arrays["bn1.bias"][0] = 1
    before = 4
    for stage, width in enumerate((4, 8, 16, 32), 1):
        name = f"layer{stage}.0"
        arrays[f"{name}.conv1.weight"] = np.zeros((width, before, 3, 3), np.float32)
        arrays[f"{name}.conv2.weight"] = np.zeros((width, width, 3, 3), np.float32)
        norm(f"{name}.bn1", width)
        norm(f"{name}.bn2", width)
        if stage > 1:
            kernel = np.zeros((width, before, 1, 1), np.float32)
            kernel[0, 0] = 1
            arrays[f"{name}.downsample.0.weight"] = kernel
            norm(f"{name}.downsample.1", width)
        before = width
    features = np.asarray(levels, np.float32) + 1
    arrays["fc.weight"] = np.zeros((len(features), before), np.float32)
    arrays["fc.weight"][:, 0] = 2 * features * 1000
    arrays["fc.bias"] = -(features**2) * 1000
    return arrays


# For 32 px images in 0..1.
GRAY_CONFIG = {
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1]},
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
}


def write_gray_resnet(folder: Any, levels: Any, **config: Any) -> pathlib.Path:
    """Writes it as timm would, with further keys of config.json."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(gray_resnet(levels), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**GRAY_CONFIG, **config}))
    return folder
