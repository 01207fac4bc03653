"""Ops: dataclasses called as `op(example, rng) -> example`, numpy only, on the host."""

from big_vision_lite.data.decode import Decode as Decode
from big_vision_lite.data.decode import UndecodableImage as UndecodableImage
from big_vision_lite.data.new_colour import Invert as Invert
from big_vision_lite.data.new_colour import Keep as Keep
from big_vision_lite.data.new_colour import ToGray as ToGray
from big_vision_lite.data.new_colour import ToRgb as ToRgb
from big_vision_lite.data.new_geometry import CentralCrop as CentralCrop
from big_vision_lite.data.new_geometry import DecodeInceptionCrop as DecodeInceptionCrop
from big_vision_lite.data.new_geometry import FlipLeftRight as FlipLeftRight
from big_vision_lite.data.new_geometry import InceptionCrop as InceptionCrop
from big_vision_lite.data.new_geometry import RandomAffine as RandomAffine
from big_vision_lite.data.new_geometry import RandomCrop as RandomCrop
from big_vision_lite.data.new_geometry import RandomResizedCrop as RandomResizedCrop
from big_vision_lite.data.new_geometry import Resize as Resize
from big_vision_lite.data.new_geometry import ResizeSmall as ResizeSmall
