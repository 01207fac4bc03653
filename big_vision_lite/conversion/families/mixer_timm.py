"""timm's MlpMixer (mixer_*) and ours."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, conv, linear, norm, same
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.mixer import MlpMixer

# timm builds a mixer by its name only: no argument changes its width or depth.
NAMES = {
    (512, 8, 32): "mixer_s32_224",
    (512, 8, 16): "mixer_s16_224",
    (768, 12, 32): "mixer_b32_224",
    (768, 12, 16): "mixer_b16_224",
    (1024, 24, 32): "mixer_l32_224",
    (1024, 24, 16): "mixer_l16_224",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmMixer(Format):
    """timm's names; its GELU is the exact one, eps 1e-6 as here."""

    name: str = "timm MLP-Mixer"
    library: Library = Library.TIMM
    model: type = MlpMixer
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight"}
        return wanted <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        arrays = weights.arrays
        for name in ("mlp_tokens", "mlp_channels"):
            made, used = (
                weights.shape(f"blocks.0.{name}.{part}.weight", 2)
                for part in ("fc1", "fc2")
            )
            if made[0] != used[1]:
                raise ValueError(
                    f"{weights.path}: {name} makes {made[0]} values and uses {used[1]} "
                    "(gMixer's gated MLP); no MlpMixer here has that."
                )
        width, channels, patch, _ = weights.shape("stem.proj.weight", 4)
        tokens, patches = weights.shape("blocks.0.mlp_tokens.fc1.weight", 2)
        blocks = {int(n.split(".")[1]) for n in arrays if re.match(r"blocks\.\d", n)}
        model = MlpMixer(
            width=width,
            depth=len(blocks),
            token_mlp_dim=tokens,
            channel_mlp_dim=weights.shape("blocks.0.mlp_channels.fc1.weight", 2)[0],
            patch_size=patch,
            head=Classifier(num_classes=weights.shape("head.weight", 2)[0])
            if "head.weight" in arrays
            else None,
            # What timm computes, also for weights that Google trained with the tanh.
            activation=Activation.GELU_ERF,
        )
        rows, columns = grid_of(patches, patch, _image_size(weights.config), weights)
        return Architecture(
            model=model,
            image_size=(rows * patch, columns * patch),
            channels=channels,
        )

    def entries(
        self, model: MlpMixer, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        table = [
            conv("stem.proj.weight", "patch_embedding/kernel"),
            same("stem.proj.bias", "patch_embedding/bias"),
            *norm("norm", "norm"),
        ]
        for index in range(model.depth):
            theirs, ours = f"blocks.{index}", f"block_{index:02d}"
            table += norm(f"{theirs}.norm1", f"{ours}/token_norm")
            table += _mlp(f"{theirs}.mlp_tokens", f"{ours}/token_mixing")
            table += norm(f"{theirs}.norm2", f"{ours}/channel_norm")
            table += _mlp(f"{theirs}.mlp_channels", f"{ours}/channel_mixing")
        if model.head is not None:
            table += linear("head", "head")
        return table

    def describe(
        self, model: MlpMixer, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        key = (model.width, model.depth, model.patch_size)
        unfit = []
        if key not in NAMES:
            unfit += ["width={}, depth={}, patch_size={}".format(*key)]
        if model.activation != Activation.GELU_ERF:
            # Up to 5e-4 of the logits: other numbers, so not exported in silence.
            unfit += [f"activation={model.activation} (timm's mixers: gelu_erf)"]
        if model.head is not None and model.head.hidden_dim is not None:
            unfit += [f"head.hidden_dim={model.head.hidden_dim}"]
        if unfit:
            raise ValueError(
                f"timm's mixers have no counterpart for {'; '.join(unfit)}. They are "
                f"{', '.join(NAMES.values())}. Export it with --to npz or safetensors."
            )
        arguments: dict[str, Any] = {
            "img_size": list(image_size),
            "num_classes": 0 if model.head is None else model.head.num_classes,
            "mlp_ratio": [
                _ratio(hidden, model.width)
                for hidden in (model.token_mlp_dim, model.channel_mlp_dim)
            ],
        }
        if len(model.mean) > 1:
            arguments["in_chans"] = len(model.mean)
        return {"architecture": NAMES[key], "model_args": arguments}


def grid_of(
    patches: int, patch: int, image_size: tuple[int, int] | None, weights: Weights
) -> tuple[int, int]:
    """Returns (rows, columns) of so many patches, by the image size or as a square.

    Raises:
        ValueError: they are neither; says how to tell the image size.
    """
    side = round(patches**0.5)
    grid = (side, side)
    if image_size is not None:
        rows, columns = (length // patch for length in image_size)
        grid = (rows, columns) if rows * columns == patches else grid
    if grid[0] * grid[1] != patches:
        given = "" if image_size is None else f" and no image of {image_size} px"
        raise ValueError(
            f"{weights.path} mixes {patches} patches of {patch} px, which are no "
            f"square{given}. Write a config.json beside it: "
            '{"model_args": {"img_size": [HEIGHT, WIDTH]}}.'
        )
    return grid


def _image_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    size = config.get("model_args", {}).get("img_size")
    if size is None:
        images = config.get("pretrained_cfg", config)
        size = images.get("input_size", (None, None, None))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return (height, width) if height and width else None


def _mlp(theirs: str, ours: str) -> list[Entry]:
    return [
        *linear(f"{theirs}.fc1", f"{ours}/hidden"),
        *linear(f"{theirs}.fc2", f"{ours}/out"),
    ]


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    # timm rounds the product down.
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


FORMATS = (TimmMixer(),)
