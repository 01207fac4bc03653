"""Proves that an exported model computes what ours does: same images, both sides.

Imported by convert_checkpoint.py; needs torch and the library in question. The images
are random pixels and eight JPEGs cut from two photographs that scikit-learn ships.
"""

import dataclasses
import hashlib
import importlib
import importlib.resources
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import simplejpeg
import torch_libraries

from big_vision_lite import trees
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.export import SAFETENSORS, Exported
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.preprocessing import Preprocessing

# Largest |difference| over largest |value|, float32 on a CPU.
BOUND = 1e-5
# Largest difference of two preprocessings of the same words, in units of 0..255: the
# gray of a JPEG file and the gray of its colours are up to 6 apart.
PIXELS_BOUND = 8.0
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
NUM_RANDOM = 2
# The channels that files of photographs can have: gray and RGB.
COLOURS = (1, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Outputs of one pair of modules: their largest difference, relative."""

    ours: str
    theirs: str
    difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """`logits` on random pixels and on photographs, relative; `layers` in order.

    `rounding` has, for those beyond the bound, how far ours and theirs are from theirs
    computed in float64. Where theirs are as far as ours, float32 is too short for this
    network, and no weight is wrong. `scale` is their largest |logit|: where all are 0,
    of a head that was not trained, the layers are judged. `pixels` is the largest
    difference of the two preprocessings in units of 0..255, `inexact` says that theirs
    computes otherwise, as the export noted, and `same_top1` is how many of the
    photographs get the same class through each side's own. `num_images` is 0 where
    photographs have other channels than images of the model.
    """

    logits: dict[str, float]
    rounding: dict[str, tuple[float, float]]
    layers: Sequence[Layer]
    scale: float
    pixels: float
    inexact: bool
    same_top1: int
    num_images: int

    @property
    def passed(self) -> bool:
        return self.weights_agree and self.pixels_agree

    @property
    def weights_agree(self) -> bool:
        agree = all(
            difference <= BOUND or self.is_rounding(kind)
            for kind, difference in self.logits.items()
        )
        # Logits that are all 0 agree whatever lies before the head.
        shown = self.scale > 0 or bool(self.layers and not self.wrong_layers)
        return agree and shown

    @property
    def pixels_agree(self) -> bool:
        return self.inexact or self.pixels <= PIXELS_BOUND

    @property
    def wrong_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if not layer.difference <= BOUND]

    def is_rounding(self, kind: str) -> bool:
        """Says whether ours are about as near to the exact logits as theirs are.

        BiT-R50x1 at 224 px is 2.1 times as far: its norms take their variance in one
        pass; two passes would make it 1.2, for 9 % of the training time on a CPU.
        """
        ours, theirs = self.rounding[kind]
        return ours <= max(BOUND, 3 * theirs)

    def text(self) -> str:
        lines = [
            f"logits on {kind}: {difference:.1e} of the largest value "
            f"(bound {BOUND:.0e})"
            for kind, difference in self.logits.items()
        ]
        lines += [
            f"  on {kind} ours are {ours:.1e} from theirs in float64, theirs in "
            f"float32 {theirs:.1e}" + (": rounding" if self.is_rounding(kind) else "")
            for kind, (ours, theirs) in self.rounding.items()
        ]
        if self.num_images:
            lines += [
                f"preprocessing of {self.num_images} photographs: at most "
                f"{self.pixels:.3g} of 255 apart",
                f"same top class, each side with its own preprocessing: "
                f"{self.same_top1} of {self.num_images}",
            ]
        else:
            lines.append("preprocessing not compared: no photograph has such channels")
        lines.append("layer by layer:")
        lines += [
            f"  {layer.difference:.1e}  {layer.ours} = {layer.theirs}"
            for layer in self.layers
        ]
        if self.scale == 0:
            lines.append(
                "all logits are 0, as of a head that was not trained: the layers count"
            )
        if not self.pixels_agree:
            lines.append(
                f"FAILED: the preprocessings differ by {self.pixels:.3g} of 255 "
                f"(bound {PIXELS_BOUND:.0f})"
            )
        if not self.weights_agree:
            wrong = self.wrong_layers
            where = f"{wrong[0].ours} = {wrong[0].theirs}" if wrong else "the head"
            lines.append(f"FAILED: the first that differs is {where}")
        return "\n".join(lines) + "\n"


def compare(
    model: Any,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    channels: int,
    exported: Exported,
    folder: pathlib.Path,
) -> Report:
    """Runs our `model` and what lies in `folder` on the same images.

    `variables` are nested, as `model.apply` takes them.
    """
    theirs = load(exported, folder)
    height, width = preprocessing.image_size_px
    rng = np.random.default_rng(0)
    shape = (NUM_RANDOM, height, width, channels)
    photographs = jpegs() if channels in COLOURS else []
    images = {"random pixels": rng.integers(0, 256, shape, np.uint8)}
    if photographs:
        made = [through(preprocessing, data) for data in photographs]
        images["photographs"] = np.stack(made)
    logits, rounding, layers, scale = {}, {}, [], 0.0
    for kind, image in images.items():
        pairs = paired_modules(in_memory(exported.entries, exported.arrays, theirs))
        ours, captured = run_ours(model, variables, image, [p[0] for p in pairs])
        other, seen = run_theirs(theirs, ours["image"], [p[1] for p in pairs])
        logits[kind] = relative(_result(ours), other)
        scale = float(np.maximum(scale, np.abs(other).max()))
        # Not a number is beyond the bound, too.
        if not logits[kind] <= BOUND:
            exact, _ = run_theirs(theirs.double(), ours["image"], [], np.float64)
            rounding[kind] = (
                relative(_result(ours), exact),
                relative(other, exact),
            )
            theirs.float()
        if kind == "random pixels":
            layers = _layers(pairs, captured, seen)
    pixels, same_top1 = 0.0, 0
    if photographs:
        own = their_images(exported, theirs, folder, photographs, channels)
        ours, _ = run_ours(model, variables, images["photographs"], [])
        other, _ = run_theirs(theirs, own, [])
        spread = np.broadcast_to(np.asarray(preprocessing.std), (channels,))
        pixels = float(np.abs((ours["image"] - own) * spread).max())
        same_top1 = int((_result(ours).argmax(-1) == other.argmax(-1)).sum())
    return Report(
        logits=logits,
        rounding=rounding,
        layers=layers,
        scale=scale,
        inexact=bool(exported.notes),
        pixels=pixels,
        same_top1=same_top1,
        num_images=len(photographs),
    )


def jpegs() -> list[bytes]:
    """Returns eight real JPEGs: the quarters of two photographs."""
    found = []
    for name in PHOTOGRAPHS:
        file = importlib.resources.files("sklearn.datasets.images") / name
        image = simplejpeg.decode_jpeg(file.read_bytes())
        rows, columns = image.shape[0] // 2, image.shape[1] // 2
        for top in (0, rows):
            for left in (0, columns):
                part = image[top : top + rows, left : left + columns]
                part = np.ascontiguousarray(part)
                found.append(simplejpeg.encode_jpeg(part, quality=95))
    return found


def through(preprocessing: Preprocessing, data: bytes) -> np.ndarray:
    """Returns what our preprocessing makes of a file, uint8 [H, W, C]."""
    example: dict[str, Any] = {"image": data}
    for op in preprocessing.ops:
        example = op(example, np.random.default_rng(0))
    return example["image"]


def load(exported: Exported, folder: pathlib.Path) -> Any:
    """Returns their model with the weights in `folder`, as its users would load it."""
    torch_libraries.import_torchvision()
    match exported.library:
        case Library.TIMM:
            timm = importlib.import_module("timm")
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        case Library.HUGGINGFACE:
            transformers = importlib.import_module("transformers")
            kind = getattr(transformers, exported.described["architectures"][0])
            model = kind.from_pretrained(folder)
        case Library.TORCHVISION:
            models = importlib.import_module("torchvision.models")
            torch_files = importlib.import_module("safetensors.torch")
            builder = getattr(models, exported.described["builder"])
            model = builder(**exported.described["arguments"])
            model.load_state_dict(torch_files.load_file(folder / SAFETENSORS))
        case other:
            raise ValueError(f"{other} has no program to compare with.")
    return model.eval()


def run_ours(
    model: Any, variables: Mapping[str, Any], image: np.ndarray, modules: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns our outputs and those of `modules` ("encoder/block_03")."""
    wanted = set(modules)

    def apply(variables: Any, image: Any) -> Any:
        return model.apply(
            variables,
            image=image,
            train=False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: (
                method == "__call__" and "/".join(module.path) in wanted
            ),
        )

    outputs, changed = jax.jit(apply)(variables, jnp.asarray(image))
    captured = {}
    for name in modules:
        node = changed.get("intermediates", {})
        for part in name.split("/"):
            node = node.get(part, {})
        if "__call__" in node and not isinstance(node["__call__"][0], dict):
            captured[name] = np.asarray(node["__call__"][0])
    return {name: np.asarray(x) for name, x in outputs.items()}, captured


def run_theirs(
    model: Any, scaled: np.ndarray, modules: Sequence[str], dtype: Any = np.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns their logits (or pooled features) and the outputs of `modules`."""
    torch = importlib.import_module("torch")
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                # A copy: the activation that follows may work in place.
                seen[name] = output.numpy().copy()

        return hook

    known = dict(model.named_modules())
    handles = [
        known[name].register_forward_hook(keep(name))
        for name in modules
        if name in known
    ]
    pixels = np.array(np.moveaxis(scaled, -1, 1), dtype, order="C")
    with torch.no_grad():
        output = model(torch.from_numpy(pixels))
    for handle in handles:
        handle.remove()
    if not isinstance(output, torch.Tensor):
        output = output.logits if "logits" in output else output.pooler_output
    return output.numpy(), seen


def their_images(
    exported: Exported,
    model: Any,
    folder: pathlib.Path,
    files: Sequence[bytes],
    channels: int,
) -> np.ndarray:
    """Returns what their own preprocessing makes of files, scaled [B, H, W, C]."""
    pillow = importlib.import_module("PIL.Image")
    mode = "L" if channels == 1 else "RGB"
    images = [pillow.open(io.BytesIO(data)).convert(mode) for data in files]
    if exported.library == Library.TIMM:
        data = importlib.import_module("timm.data")
        config = data.resolve_model_data_config(model)
        transform = data.create_transform(**config)
        made = [transform(image).numpy() for image in images]
    elif exported.library == Library.HUGGINGFACE:
        transformers = importlib.import_module("transformers")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        made = list(processor(images, return_tensors="np")["pixel_values"])
    else:
        transforms = importlib.import_module("torchvision.transforms")
        presets = importlib.import_module("torchvision.transforms._presets")
        config = json.loads(exported.files["config.json"])["transforms"]
        mode = transforms.InterpolationMode(config["interpolation"])
        transform = presets.ImageClassification(**{**config, "interpolation": mode})
        made = [transform(image).numpy() for image in images]
    return np.moveaxis(np.stack(made), 1, -1)


def in_memory(
    entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], model: Any
) -> list[Entry]:
    """Returns the entries with their names as the loaded model has them.

    Newer versions of transformers load old names into modules of other names; there an
    array is found by its values, and one that is not the only one of them left out.
    """
    known = {n: x.detach().numpy() for n, x in model.state_dict().items()}
    by_values: dict[bytes, list[str]] = {}
    for name, array in known.items():
        by_values.setdefault(_digest(array), []).append(name)
    found = []
    for entry in entries:
        names = []
        for name in entry.theirs:
            alike = by_values.get(_digest(arrays[name]), [])
            names += [name] if name in known else alike if len(alike) == 1 else []
        if len(names) == len(entry.theirs):
            found.append(dataclasses.replace(entry, theirs=tuple(names)))
    return found


def _digest(array: np.ndarray) -> bytes:
    shape = str(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()


def paired_modules(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Lists (our module, their module) that hold the same arrays, in table order."""
    ours: dict[str, set[int]] = {}
    theirs: dict[str, set[int]] = {}
    for index, entry in enumerate(entries):
        for name in entry.ours:
            # Statistics lie in the modules of their parameters, as theirs do.
            for module in _above(name.removeprefix(trees.STATISTICS), "/"):
                ours.setdefault(module, set()).add(index)
        for name in entry.theirs:
            for module in _above(name, "."):
                theirs.setdefault(module, set()).add(index)
    # Of several modules around the same arrays the outermost, on each side.
    by_content: dict[frozenset[int], str] = {}
    for module, content in theirs.items():
        by_content.setdefault(frozenset(content), module)
    pairs, used = [], set()
    for module, content in ours.items():
        key = frozenset(content)
        if key in by_content and key not in used:
            used.add(key)
            pairs.append((max(content), len(content), module, by_content[key]))
    return [(ours, theirs) for _, _, ours, theirs in sorted(pairs)]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest |difference| over the largest |value| of theirs."""
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _above(name: str, separator: str) -> list[str]:
    parts = name.split(separator)
    return [separator.join(parts[:length]) for length in range(1, len(parts))]


def _result(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return outputs.get("logits", outputs["pooled"])


def _layers(
    pairs: Sequence[tuple[str, str]],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
) -> list[Layer]:
    found = []
    for mine, other in pairs:
        if mine not in ours or other not in theirs:
            continue
        a, b = ours[mine], theirs[other]
        if a.ndim == b.ndim == 4:
            b = np.moveaxis(b, 1, -1)
        # Norms of timm may hold the ReLU that follows them here.
        if b.min() >= 0 and a.min() < 0:
            a = np.maximum(a, 0)
        if a.size == b.size:
            difference = relative(a.reshape(b.shape), b)
            found.append(Layer(ours=mine, theirs=other, difference=difference))
    return found
