"""Ops: dataclasses called as `op(example, rng) -> example`, numpy only, on the host."""

from big_vision_lite.data.ops.colour import Invert as Invert
from big_vision_lite.data.ops.colour import Keep as Keep
from big_vision_lite.data.ops.colour import Pad as Pad
from big_vision_lite.data.ops.colour import ToGray as ToGray
from big_vision_lite.data.ops.colour import ToRgb as ToRgb
from big_vision_lite.data.ops.decode import Decode as Decode
from big_vision_lite.data.ops.decode import UndecodableImage as UndecodableImage
from big_vision_lite.data.ops.distort import ColorJitter as ColorJitter
from big_vision_lite.data.ops.distort import GaussianBlur as GaussianBlur
from big_vision_lite.data.ops.distort import RandomGray as RandomGray
from big_vision_lite.data.ops.distort import Solarize as Solarize
from big_vision_lite.data.ops.geometry import CentralCrop as CentralCrop
from big_vision_lite.data.ops.geometry import DecodeInceptionCrop as DecodeInceptionCrop
from big_vision_lite.data.ops.geometry import FlipLeftRight as FlipLeftRight
from big_vision_lite.data.ops.geometry import InceptionCrop as InceptionCrop
from big_vision_lite.data.ops.geometry import RandomAffine as RandomAffine
from big_vision_lite.data.ops.geometry import RandomCrop as RandomCrop
from big_vision_lite.data.ops.geometry import RandomResizedCrop as RandomResizedCrop
from big_vision_lite.data.ops.geometry import Resize as Resize
from big_vision_lite.data.ops.geometry import ResizeSmall as ResizeSmall
from big_vision_lite.data.ops.orientation import Orientation as Orientation
from big_vision_lite.data.ops.text import Describe as Describe
from big_vision_lite.data.ops.text import Tokenize as Tokenize
from big_vision_lite.data.ops.tokenizers import Bytes as Bytes
from big_vision_lite.data.ops.tokenizers import (
    HuggingFaceTokenizer as HuggingFaceTokenizer,
)
from big_vision_lite.data.ops.tokenizers import SentencePiece as SentencePiece
from big_vision_lite.data.ops.views import View as View
from big_vision_lite.data.ops.views import Views as Views
