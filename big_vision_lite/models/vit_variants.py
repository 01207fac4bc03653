"""Published variants of ViT, built by setting its fields.

Each function takes a size, like ViT.of, and fields to override; DeiT is
`deit("S/16", head=Classifier(num_classes=1000))`.
"""

from typing import Any

from big_vision_lite.models import vit
from big_vision_lite.models.bit_v1 import Standardisation, Trunk
from big_vision_lite.models.blocks.layers import Dtype, Remat
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# Width, depth, MLP width and heads of DINOv2's largest: arXiv:2304.07193, Table 17; the
# MLP is 2/3 as wide as 4 * width, because SwiGLU has a gate beside it.
DINOV2_GIANT = {"width": 1536, "depth": 40, "mlp_dim": 4096, "num_heads": 24}
# Underlying sizes that are resized at every use: arXiv:2212.08013, section 3.
FLEXIVIT_PATCH, FLEXIVIT_GRID = 32, (7, 7)


def siglip(size: str, **overrides: object) -> ViT:
    """Builds the image tower of SigLIP (arXiv:2303.15343), like "So400m/14".

    "pooled" is compared with text embeddings. timm computes some SigLIPs with the exact
    GELU; the weights were trained with the tanh form.
    """
    fields = {"pooling": Pooling.ATTENTION, "positions": Positions.LEARNED}
    return ViT.of(size, **{**fields, **overrides})


def dinov2(size: str, *, registers: int = 0, **overrides: object) -> ViT:
    """Builds DINOv2 (arXiv:2304.07193): "S/14", "B/14", "L/14" or "g/14".

    Published weights have 0 or 4 `registers` (arXiv:2309.16588), and images of 518 px.
    """
    fields: dict[str, object] = {
        "pooling": Pooling.CLASS_TOKEN,
        "positions": Positions.LEARNED,
        "activation": Activation.GELU_ERF,
        "layer_scale": 1e-5,
        "registers": registers,
    }
    if size.startswith("g/"):
        fields |= {**DINOV2_GIANT, "activation": Activation.SWIGLU}
    return ViT.of(size, **{**fields, **overrides})


def deit(size: str, *, distilled: bool = False, **overrides: object) -> ViT:
    """Builds DeiT (arXiv:2012.12877): "Ti/16", "S/16" or "B/16"."""
    fields = {
        "pooling": Pooling.CLASS_TOKEN,
        "positions": Positions.LEARNED,
        "activation": Activation.GELU_ERF,
        "distillation_token": distilled,
    }
    return ViT.of(size, **{**fields, **overrides})


def deit3(size: str, **overrides: object) -> ViT:
    """Builds DeiT III (arXiv:2204.07118): "S/16", "M/16", "B/16", "L/16" or "H/14"."""
    return deit(size, **{"layer_scale": 1e-6, **overrides})


def flexivit(size: str, **overrides: object) -> ViT:
    """Builds FlexiViT (arXiv:2212.08013) with any patch size, like "B/16".

    The parameters are the same for every patch and image size.
    """
    fields = {
        "pooling": Pooling.CLASS_TOKEN,
        "positions": Positions.LEARNED,
        "kernel_patch_size": FLEXIVIT_PATCH,
        "position_grid": FLEXIVIT_GRID,
    }
    return ViT.of(size, **{**fields, **overrides})


# Units per stage of the trunk, transformer size, side of a patch in grid cells: those
# of the published weights, as timm 1.0.31 builds them for loading. The name ends in
# pixels per token, except for R+Ti/16, whose 8 cells of 4 px are 32.
SIZES = {
    "R+Ti/16": ((), "Ti", 8),
    "R26+S/32": ((2, 2, 2, 2), "S", 1),
    # The third stage has the fourth's units, too: 16 px per token with patches of 1.
    "R50+B/16": ((3, 4, 9), "B", 1),
    "R50+L/32": ((3, 4, 6, 3), "L", 1),
}


def hybrid(
    size: str,
    *,
    standardisation: Standardisation = Standardisation.OUTSIDE_ROOT,
    trunk_norm_epsilon: float = 1e-6,
    dtype: Dtype = Dtype.FLOAT32,
    remat: Remat = Remat.NONE,
    **overrides: Any,
) -> ViT:
    """Builds a published hybrid of ResNet and ViT by name, like "R26+S/32".

    `overrides` are fields of the ViT, which has a class token and learned positions as
    published. timm uses standardisation="inside_root" and trunk_norm_epsilon=1e-5.
    """
    if size not in SIZES:
        raise ValueError(
            f'No hybrid is called "{size}"; use one of {", ".join(SIZES)}.'
        )
    stages, transformer, patch = SIZES[size]
    width, depth, mlp_dim, num_heads = vit.SIZES[transformer]
    fields: dict[str, Any] = dict(
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        patch_size=patch,
        pooling=Pooling.CLASS_TOKEN,
        positions=Positions.LEARNED,
        dtype=dtype,
        remat=remat,
        stem=Trunk(
            stages=stages,
            standardisation=standardisation,
            norm_epsilon=trunk_norm_epsilon,
            dtype=dtype,
            remat=remat,
        ),
    )
    return ViT(**{**fields, **overrides})
