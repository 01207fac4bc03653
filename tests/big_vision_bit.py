"""big_vision's ResNet v1 with group norm, written again in numpy, in float64.

Written from what is published of it, for archives in its names; no code of the
package. `random_variables` fills a model of ours with generic numbers.
"""

import numpy as np

from big_vision_lite.conversion import formats

EPSILON_WEIGHTS, EPSILON_NORM, GROUPS = 1e-5, 1e-6, 32


def same_padding(side, size, stride):
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    return total // 2, total - total // 2


def windows(x, size, stride, fill):
    pads = [same_padding(side, size, stride) for side in x.shape[1:3]]
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return view[:, ::stride, ::stride]  # [B, h, w, C, size, size]


def conv(x, kernel, stride=1):
    kernel = np.float64(kernel)
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + EPSILON_WEIGHTS)
    seen = windows(x, kernel.shape[0], stride, 0.0)
    return np.einsum("bhwcij,ijco->bhwo", seen, kernel, optimize=True)


def norm(x, scale, bias):
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, GROUPS, channels // GROUPS)
    mean = x.mean(axis=(1, 2, 4), keepdims=True)
    var = x.var(axis=(1, 2, 4), keepdims=True)
    x = ((x - mean) / np.sqrt(var + EPSILON_NORM)).reshape(
        batch, height, width, channels
    )
    return x * np.float64(scale).reshape(-1) + np.float64(bias).reshape(-1)


def grid(arrays, image):
    """Returns the last stage's output [B, h, w, D] for scaled pixels."""

    def normed(x, name):
        return norm(x, arrays[f"{name}/scale"], arrays[f"{name}/bias"])

    x = conv(np.float64(image), arrays["conv_root/kernel"], 2)
    x = np.maximum(normed(x, "gn_root"), 0)
    x = windows(x, 3, 2, -np.inf).max(axis=(-2, -1))
    block = 1
    while f"block{block}/unit1/conv1/kernel" in arrays:
        unit = 1
        while f"block{block}/unit{unit}/conv1/kernel" in arrays:
            name = f"block{block}/unit{unit}"
            stride = 2 if block > 1 and unit == 1 else 1
            y = conv(x, arrays[f"{name}/conv1/kernel"])
            y = np.maximum(normed(y, f"{name}/gn1"), 0)
            y = conv(y, arrays[f"{name}/conv2/kernel"], stride)
            y = np.maximum(normed(y, f"{name}/gn2"), 0)
            y = normed(conv(y, arrays[f"{name}/conv3/kernel"]), f"{name}/gn3")
            if f"{name}/conv_proj/kernel" in arrays:
                x = conv(x, arrays[f"{name}/conv_proj/kernel"], stride)
                x = normed(x, f"{name}/gn_proj")
            x = np.maximum(x + y, 0)
            unit += 1
        block += 1
    return x


def trunk_arrays(stages, width=32, channels=3, seed=0):
    """Returns generic arrays of the trunk, in the names of section 18.6."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def add(name, shape, gn):
        kernel = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        arrays[f"{name}/kernel"] = np.float32(kernel)
        signs = rng.choice((-1, 1), shape[-1])
        arrays[f"{gn}/scale"] = np.float32(rng.uniform(0.5, 1.5, shape[-1]) * signs)
        arrays[f"{gn}/bias"] = np.float32(rng.normal(scale=0.3, size=shape[-1]))

    add("conv_root", (7, 7, channels, width), "gn_root")
    last = width
    for block, units in enumerate(stages, 1):
        inner = width * 2 ** (block - 1)
        for unit in range(1, units + 1):
            name = f"block{block}/unit{unit}"
            add(f"{name}/conv1", (1, 1, last, inner), f"{name}/gn1")
            add(f"{name}/conv2", (3, 3, inner, inner), f"{name}/gn2")
            add(f"{name}/conv3", (1, 1, inner, 4 * inner), f"{name}/gn3")
            if unit == 1:
                projection = (1, 1, last, 4 * inner)
                add(f"{name}/conv_proj", projection, f"{name}/gn_proj")
            last = 4 * inner
    return arrays


def random_variables(model, image_size_px, channels=3, seed=0):
    """Returns {name: array} for a model of ours, no two alike and none trivial."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in formats.shapes(model, image_size_px, channels).items():
        if name.endswith("kernel"):
            values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        elif name.endswith("scale"):
            values = rng.uniform(0.5, 1.5, shape) * rng.choice((-1, 1), shape)
        elif name.endswith("variance"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(scale=0.3, size=shape)
        found[name] = np.asarray(values, np.float32)
    return found
