"""Images by random access: prepared TFDS sets, image folders, arrays.

A source is cheap until it is first used, then opened once; a pickle holds its fields
only, so that worker processes open their own. `source[i]` is {"image", "label"}; some
have no label, some have more: "mask", "boxes", text.
"""

from big_vision_lite.data.sources.arrays import Digits as Digits
from big_vision_lite.data.sources.arrays import InMemory as InMemory
from big_vision_lite.data.sources.folder import ImageFolder as ImageFolder
from big_vision_lite.data.sources.folder import folder_splits as folder_splits
from big_vision_lite.data.sources.tfds.source import Tfds as Tfds
