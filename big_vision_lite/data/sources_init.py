"""Labelled images by random access: prepared TFDS sets, image folders, arrays.

A source is cheap until it is first used, then opened once; a pickle holds its fields
only, so that worker processes open their own. `source[i]` is {"image", "label"}.
"""

from big_vision_lite.data.in_memory import Digits as Digits
from big_vision_lite.data.in_memory import InMemory as InMemory
from big_vision_lite.data.new_folder import ImageFolder as ImageFolder
from big_vision_lite.data.new_folder import folder_splits as folder_splits
from big_vision_lite.data.new_source import Tfds as Tfds
