"""MLP-Mixer of timm and of the archives of vision_transformer and big_vision."""

from collections.abc import Mapping
from typing import Any

from big_vision_lite.conversion import preprocessing, tables
from big_vision_lite.conversion.assumption import Assumption, of_architecture
from big_vision_lite.conversion.families import libraries
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.mixer import MlpMixer

TIMM: Rows = {
    "patch_embedding": "stem.proj",
    "block_{b}/token_norm": "blocks.{b}.norm1",
    "block_{b}/token_mixing/hidden": "blocks.{b}.mlp_tokens.fc1",
    "block_{b}/token_mixing/out": "blocks.{b}.mlp_tokens.fc2",
    "block_{b}/channel_norm": "blocks.{b}.norm2",
    "block_{b}/channel_mixing/hidden": "blocks.{b}.mlp_channels.fc1",
    "block_{b}/channel_mixing/out": "blocks.{b}.mlp_channels.fc2",
    "norm": "norm",
    "head": "head",
}
ARCHIVE: Rows = {
    "patch_embedding": "stem",
    "block_{b}/token_norm": "MixerBlock_{b}/LayerNorm_0",
    "block_{b}/token_mixing/hidden": "MixerBlock_{b}/token_mixing/Dense_0",
    "block_{b}/token_mixing/out": "MixerBlock_{b}/token_mixing/Dense_1",
    "block_{b}/channel_norm": "MixerBlock_{b}/LayerNorm_1",
    "block_{b}/channel_mixing/hidden": "MixerBlock_{b}/channel_mixing/Dense_0",
    "block_{b}/channel_mixing/out": "MixerBlock_{b}/channel_mixing/Dense_1",
    "norm": "pre_head_layer_norm",
    "head": "head",
}
EXACT_GELU = (
    "activation=gelu_erf assumed, timm's, also for weights that were trained with the "
    "tanh form: no configuration came along"
)
# timm builds these mixers by name: no argument changes their width or depth.
NAMES = {
    (512, 8, 32): "mixer_s32_224",
    (512, 8, 16): "mixer_s16_224",
    (768, 12, 32): "mixer_b32_224",
    (768, 12, 16): "mixer_b16_224",
    (1024, 24, 32): "mixer_l32_224",
    (1024, 24, 16): "mixer_l16_224",
}


class TimmMixer(Format):
    """MLP-Mixer in timm's names, with the exact GELU and eps 1e-6, as here."""

    name = "timm MLP-Mixer"
    library = Library.TIMM
    model = MlpMixer
    table = TIMM
    signs = ("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight")
    # The tanh GELU changes logits by up to 5e-4.
    requires = {"activation": Activation.GELU_ERF, "head.hidden_dim": None}

    def architecture(self, weights: Weights) -> Architecture:
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
        sizes = weights.sizes(
            {
                "stem.proj.weight": "width channels patch_size patch_size",
                "blocks.0.mlp_tokens.fc1.weight": "token_mlp_dim patches",
                "blocks.0.mlp_channels.fc1.weight": "channel_mlp_dim width",
            }
        )
        model = MlpMixer(
            depth=weights.count(r"blocks\.(\d+)\."),
            head=weights.head("head.weight"),
            # timm computes it even for weights that Google trained with the tanh.
            activation=Activation.GELU_ERF,
            **_fields(sizes),
        )
        size = _size_of_timm(weights.config)
        said = () if weights.config else of_architecture(EXACT_GELU)
        return _architecture(model, sizes, size, weights, said)

    def describe(self, model: MlpMixer, size: Size, channels: int) -> dict[str, Any]:
        key = (model.width, model.depth, model.patch_size)
        if key not in NAMES:
            raise ValueError(
                "timm has no MLP-Mixer of width={}, depth={} and patch_size={}; it has "
                "{}.".format(*key, ", ".join(NAMES.values()))
            )
        hidden = (model.token_mlp_dim, model.channel_mlp_dim)
        ratios = [libraries.width_ratio(each, model.width) for each in hidden]
        return libraries.timm(
            NAMES[key], model, channels, img_size=list(size), mlp_ratio=ratios
        )


class ArchivedMixer(Format):
    """MLP-Mixer in the names of both programs, with tanh GELU and eps 1e-6, as here."""

    name = "big_vision MLP-Mixer (npz)"
    library = Library.NPZ
    model = MlpMixer
    dialect = tables.ARCHIVE
    table = ARCHIVE
    assumes = preprocessing.OF_BIG_VISION
    signs = ("stem/kernel", "MixerBlock_0/token_mixing/Dense_0/kernel")
    requires = {"activation": Activation.GELU_TANH, "head.hidden_dim": None}

    def architecture(self, weights: Weights) -> Architecture:
        block = "MixerBlock_0"
        sizes = weights.sizes(
            {
                "stem/kernel": "patch_size patch_size channels width",
                f"{block}/token_mixing/Dense_0/kernel": "patches token_mlp_dim",
                f"{block}/channel_mixing/Dense_0/kernel": "width channel_mlp_dim",
            }
        )
        model = MlpMixer(
            depth=weights.count(r"MixerBlock_(\d+)/"),
            head=weights.head("head/kernel", "_ classes"),
            **_fields(sizes),
        )
        size = weights.config.get("image_size")
        size = (size, size) if isinstance(size, int) else size and tuple(size)
        return _architecture(model, sizes, size, weights)


def _fields(sizes: Mapping[str, int]) -> dict[str, Any]:
    names = ("width", "token_mlp_dim", "channel_mlp_dim", "patch_size")
    return {name: sizes[name] for name in names}


def _architecture(
    model: MlpMixer,
    sizes: Mapping[str, int],
    image_size_px: tuple[int, int] | None,
    weights: Weights,
    assumptions: tuple[Assumption, ...] = (),
) -> Architecture:
    """Returns a model whose patches fill `image_size_px`, or else a square.

    Raises:
        ValueError: they do neither; says where to write the image size.
    """
    patches, patch = sizes["patches"], model.patch_size
    side = round(patches**0.5)
    rows, columns = side, side
    if image_size_px is not None:
        given = [length // patch for length in image_size_px]
        if given[0] * given[1] == patches:
            rows, columns = given
    if rows * columns != patches:
        given = "" if image_size_px is None else f" and no image of {image_size_px} px"
        raise ValueError(
            f"{weights.path} mixes {patches} patches of {patch} px, which are no "
            f"square{given}. Write a config.json beside it: "
            '{"model_args": {"img_size": [HEIGHT, WIDTH]}}.'
        )
    return Architecture(
        model=model,
        image_size_px=(rows * patch, columns * patch),
        channels=sizes["channels"],
        assumptions=assumptions,
    )


def _size_of_timm(config: Mapping[str, Any]) -> tuple[int, int] | None:
    size = config.get("model_args", {}).get("img_size")
    if size is None:
        images = config.get("pretrained_cfg", config)
        size = images.get("input_size", (None, None, None))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return (height, width) if height and width else None


FORMATS = (ArchivedMixer(), TimmMixer())
