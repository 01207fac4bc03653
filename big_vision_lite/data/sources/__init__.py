"""Images by random access: prepared TFDS sets, image folders, tables, arrays.

A source opens its data once, at the first use. A pickle holds its fields only, so that
worker processes open the data themselves. `source[i]` is {"image", "label"}; some
sources have no label, some have more keys: "mask", "boxes", text.
"""

from big_vision_lite.data.sources.arrays import Digits as Digits
from big_vision_lite.data.sources.arrays import InMemory as InMemory
from big_vision_lite.data.sources.folder import ImageFolder as ImageFolder
from big_vision_lite.data.sources.folder import folder_splits as folder_splits
from big_vision_lite.data.sources.resampled import Frequency as Frequency
from big_vision_lite.data.sources.resampled import Resampled as Resampled
from big_vision_lite.data.sources.table import Table as Table
from big_vision_lite.data.sources.table_labels import LabelKind as LabelKind
from big_vision_lite.data.sources.tags import Tags as Tags
from big_vision_lite.data.sources.tfds.source import Tfds as Tfds
