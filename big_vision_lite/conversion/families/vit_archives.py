"""ViT in the npz archives of big_vision and vision_transformer."""

from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion import preprocessing, tables
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import vit
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Logits


def _attention(ours: str, theirs: str) -> Rows:
    """Returns the rows of one attention."""
    return {f"{ours}/{part}": f"{theirs}/{part}" for part in (*vit.PARTS, "out")}


def _mlp(ours: str, theirs: str) -> Rows:
    """Returns the rows of one MLP."""
    return {f"{ours}/hidden": f"{theirs}/Dense_0", f"{ours}/out": f"{theirs}/Dense_1"}


class BigVisionViT(Format):
    """big_vision's ViT, with tanh GELU and eps 1e-6, as in vision_transformer.

    `root` precedes all names ("img/" in image-text checkpoints). A `block` without a
    number holds all blocks in one array for each name, stacked along the first axis.
    `positions` is the name of [1, N, D], or with `token_position` of [1, 1 + N, D],
    where the class token has a position too. `norms`, `attention` and `mlp` are the
    names in a block.
    """

    name = "big_vision ViT (npz)"
    library = Library.NPZ
    model = ViT
    dialect = tables.ARCHIVE
    assumes = preprocessing.OF_BIG_VISION
    # Archives without a representation layer may have an empty entry for it.
    ignored = ("pre_logits",)
    requires = vit.requires(
        "head.hidden_dim",
        pooling=[Pooling.CLASS_TOKEN, Pooling.AVERAGE, Pooling.ATTENTION],
        positions=[Positions.SINCOS, Positions.LEARNED],
    )
    root = ""
    block = "encoderblock_{b}"
    positions = "pos_embedding"
    token_position = False
    norms = ("LayerNorm_0", "LayerNorm_1")
    attention = "MultiHeadDotProductAttention_0"
    mlp = "MlpBlock_0"

    def recognises(self, weights: Weights) -> bool:
        root, names = self.root, weights.arrays.keys()
        first = f"{root}Transformer/{self.block.format(b=0)}"
        wanted = {
            f"{root}embedding/kernel",
            f"{first}/{self.mlp}/Dense_0/kernel",
            f"{first}/{self.norms[1]}/scale",
        }
        # Hybrids have a stem of convolutions.
        return wanted <= names and f"{root}conv_root/kernel" not in names

    def architecture(self, weights: Weights) -> Architecture:
        root, arrays = self.root, weights.arrays
        depth = "depth " if self.stacked else ""
        block = f"{root}Transformer/{self.block.format(b=0)}"
        sizes = weights.sizes(
            {
                f"{root}embedding/kernel": "patch_size patch_size channels width",
                f"{block}/{self.attention}/query/kernel": f"{depth}width num_heads _",
                f"{block}/{self.mlp}/Dense_0/kernel": f"{depth}width mlp_dim",
            }
        )
        has_positions = f"{root}{self.positions}" in arrays
        model = ViT(
            width=sizes["width"],
            depth=sizes["depth"]
            if self.stacked
            else weights.count(rf"{root}Transformer/encoderblock_(\d+)/"),
            mlp_dim=sizes["mlp_dim"],
            num_heads=sizes["num_heads"],
            patch_size=sizes["patch_size"],
            pooling=self._pooling(weights),
            positions=Positions.LEARNED if has_positions else Positions.SINCOS,
            head=self._head(weights),
        )
        notes: list[str] = []
        # An embedding, no classes.
        of_text = root and model.head is not None
        if of_text:
            notes += ["the head is the projection to the space shared with text"]
        image_size_px = None
        if has_positions:
            count = weights.shape(f"{root}{self.positions}", 3)[1]
            count -= int(f"{root}cls" in arrays and self.token_position)
            rows, columns = _grid(count, model.patch_size, weights)
            image_size_px = (rows * model.patch_size, columns * model.patch_size)
        else:
            notes += ["no positions in the file: fixed sines and cosines (sincos2d)"]
        return Architecture(
            model=model,
            image_size_px=image_size_px,
            channels=sizes["channels"],
            logits=Logits.NONE if of_text else None,
            assumptions=of_architecture(*notes),
        )

    def rows(self, model: ViT) -> Rows:
        block = {
            "attention_norm": self.norms[0],
            **_attention("attention", self.attention),
            "mlp_norm": self.norms[1],
            **_mlp("mlp", self.mlp),
        }
        rows = {
            "patch_embedding": "embedding",
            "class_token": "cls",
            **under(f"Transformer/{self.block}/", block, ours=vit.BLOCK),
            "encoder/norm": "Transformer/encoder_norm",
            "pooling/probe": "MAPHead_0/probe",
            **_attention(
                "pooling/attention", "MAPHead_0/MultiHeadDotProductAttention_0"
            ),
            "pooling/norm": "MAPHead_0/LayerNorm_0",
            **_mlp("pooling/mlp", "MAPHead_0/MlpBlock_0"),
            "head/pre_logits": "pre_logits",
            "head": "head",
        }
        return under(self.root, rows)

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        if model.positions != Positions.LEARNED and not self.token_position:
            return ()
        folds = model.pooling == Pooling.CLASS_TOKEN and self.token_position
        return [
            vit.tokens_and_positions(
                model,
                grid_size(*size, model.patch_size),
                positions=f"{self.root}{self.positions}",
                theirs={f"{self.root}cls": 1} if folds else {},
                ours={"class_token": 1} if folds else {},
                rows=(int(folds),),
            )
        ]

    @property
    def stacked(self) -> bool:
        return "{b}" not in self.block

    def _pooling(self, weights: Weights) -> Pooling:
        if f"{self.root}MAPHead_0/probe" in weights.arrays:
            return Pooling.ATTENTION
        has_token = f"{self.root}cls" in weights.arrays
        return Pooling.CLASS_TOKEN if has_token else Pooling.AVERAGE

    def _head(self, weights: Weights) -> Classifier | None:
        representation = f"{self.root}pre_logits/kernel"
        head = weights.head(f"{self.root}head/kernel", "_ classes")
        if representation not in weights.arrays:
            return head
        if head is None:
            raise ValueError(
                f"{weights.path} has a representation layer (pre_logits) but no head, "
                "which no model here is: remove the arrays of pre_logits from the "
                "archive to get the features before it."
            )
        hidden = weights.shape(representation, 2)[1]
        return Classifier(num_classes=head.num_classes, hidden_dim=hidden)


class ReadOnly(BigVisionViT):
    """A layout that is read, but not written: a ViT is written as BigVisionViT."""

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        raise ValueError(f"Archives are written as {BigVisionViT.name} only.")


class StackedViT(ReadOnly):
    """big_vision's ViT with `scan`: all blocks in one array."""

    name = "big_vision ViT (npz, stacked blocks)"
    block = "encoderblock"


class ImageTextViT(ReadOnly):
    """The image tower of an image-text checkpoint."""

    name = "big_vision image-text ViT (npz)"
    root = "img/"
    # The text tower, the temperature and the bias are not read.
    ignored = ("img/pre_logits", "txt/.*", "t", "b")


class StackedImageTextViT(ImageTextViT):
    """The image tower of an image-text checkpoint, all blocks in one array."""

    name = "big_vision image-text ViT (npz, stacked blocks)"
    block = "encoderblock"


class VisionTransformerViT(ReadOnly):
    """ViT in the archives of vision_transformer; the class token has a position."""

    name = "vision_transformer ViT (npz)"
    positions = "Transformer/posembed_input/pos_embedding"
    token_position = True
    norms = ("LayerNorm_0", "LayerNorm_2")
    attention = "MultiHeadDotProductAttention_1"
    mlp = "MlpBlock_3"


def _grid(count: int, patch: int, weights: Weights) -> tuple[int, int]:
    given = weights.config.get("image_size")
    if given is not None:
        height, width = given if isinstance(given, list | tuple) else (given, given)
        rows, columns = grid_size(height, width, patch)
        if rows * columns != count:
            raise ValueError(
                f"{weights.path} has positions for {count} patches of {patch} px, and "
                f"config.json says image_size {height}x{width}, which has "
                f"{rows}x{columns}. Correct config.json."
            )
        return rows, columns
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(
            f"{weights.path} has positions for {count} patches, which are no square; "
            "how many rows they are, the archive does not say. Put a config.json "
            'beside it: {"image_size": [HEIGHT, WIDTH]}, in pixels.'
        )
    return side, side


FORMATS = (
    BigVisionViT(),
    StackedViT(),
    ImageTextViT(),
    StackedImageTextViT(),
    VisionTransformerViT(),
)
