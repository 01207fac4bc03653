"""Hybrids: a vision transformer over the grid of a ResNet instead of pixels.

arXiv:2010.11929, Section 3.1; smaller ones in arXiv:2106.10270, Table 1.
"""

from typing import Any

from big_vision_lite.models import vit
from big_vision_lite.models.bit_v1 import Standardisation, Trunk
from big_vision_lite.models.layers import Dtype, Remat
from big_vision_lite.models.pooling import Pooling
from big_vision_lite.models.positions import Positions
from big_vision_lite.models.vit import ViT

# Units of the trunk's stages, size of the transformer, cells of the grid a patch: those
# of the published weights, as timm 1.0.31 builds them for loading. Behind the slash
# stand pixels a token, but for R+Ti/16, whose 8 cells of 4 px are 32.
SIZES = {
    "R+Ti/16": ((), "Ti", 8),
    "R26+S/32": ((2, 2, 2, 2), "S", 1),
    # The units of the fourth stage moved to the third: 16 px a token with patches of 1.
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
    """Builds a published hybrid by its name, like "R26+S/32".

    `overrides` are fields of the ViT, which has a class token and learned positions as
    published. timm has standardisation="inside_root" and trunk_norm_epsilon=1e-5.
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
