"""How images become the input of a model that was trained elsewhere."""

import dataclasses

from big_vision_lite.conversion.formats import Weights
from big_vision_lite.data.ops import CentralCrop, Decode, ResizeSmall
from big_vision_lite.types import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """`ops` lead from a file to uint8 [*image_size, C]; mean and std are in 0..255."""

    ops: tuple[Op, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    notes: tuple[str, ...] = ()


def read(weights: Weights, image_size: tuple[int, int] | None) -> Preprocessing:
    """Returns the preprocessing that comes with weights; notes say what was assumed."""
    height, width = image_size or (224, 224)
    return Preprocessing(
        ops=(
            Decode(),
            ResizeSmall(size=min(height, width) * 8 // 7),
            CentralCrop(size=height, width=width),
        ),
        mean=(127.5,),
        std=(127.5,),
        image_size=(height, width),
        notes=("no preprocessing comes with the weights: 7/8 central crop, [-1, 1]",),
    )
