"""What a case of a format is, and what the cases of all families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling

CLASSES = 7
HEAD = Classifier(num_classes=CLASSES)
NO_HEAD: dict[str, Any] = {"head": None}
TOKEN = dict(pooling=Pooling.CLASS_TOKEN, positions=Positions.LEARNED)
# Of convolutional networks: even at every stride, odd at every stride, and neither
# square nor of one kind.
EVEN, ODD, NOT_SQUARE = (64, 64), (65, 65), (48, 82)
ALL = (ODD, EVEN, NOT_SQUARE)
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model in a format: that of another library, or ours, or both.

    `form` is the format it is known by. `build()` makes theirs, which is compared at
    `sizes`, by default at the first; it alone imports their library. `goes_by_name`
    says that the library builds it by a name. `ours` is a model for images of 16 px;
    its weights are written in the format and damaged, without any library. `config` is
    the config.json beside the weights; None is what save_pretrained writes of theirs
    and `describe` of ours. What is `slow` runs with -m slow only.
    """

    form: str
    build: Callable[[], Any] | None = None
    ours: Any = None
    config: Mapping[str, Any] | None = None
    sizes: tuple[Size, ...] = (EVEN,)
    goes_by_name: bool = False
    slow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """A model of ours that goes out as a folder of the library.

    `returns` says that what users load is read back as it was: not with fixed positions
    where they come back as the table that they are, nor what leaves as another one.
    """

    library: Library
    model: Any
    size: Size = EVEN
    channels: int = 3
    returns: bool = True
    slow: bool = False


def slow(case: Any) -> Any:
    """Returns a case that runs with -m slow only."""
    return dataclasses.replace(case, slow=True)


def side(size: Any) -> Size:
    """Returns (height, width) of what their arguments give as one number or two."""
    return (size, size) if isinstance(size, int) else tuple(size)
