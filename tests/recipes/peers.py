"""What the figures of the README's table and of tests/training/test_bars.py are of.

A plain model on plain data: no mixup, no hidden layer in the head; softmax
cross-entropy, AdamW.
"""

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    ResizeSmall,
)
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.models.bit_v1 import BiTV1
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runtime.sharding import Mesh
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `depth` in blocks, or in stages of a ResNet-50, 0 for all."""
    chosen = parse_arg(arg, model="S/16", depth=0, batch=1024, fsdp=1, parts=1)
    head = Classifier(num_classes=1000)
    if chosen.model == "R50":
        changed = {"stages": (3, 4, 6, 3)[: chosen.depth]} if chosen.depth else {}
        model = ResNet.of("R50", head=head, dtype=Dtype.BFLOAT16, **changed)
    elif chosen.model == "BiT-R50x1":
        model = BiTV1.of("R50x1", head=head, dtype=Dtype.BFLOAT16)
    else:
        changed = {"depth": chosen.depth} if chosen.depth else {}
        model = ViT.of(chosen.model, head=head, dtype=Dtype.BFLOAT16, **changed)
    return TrainConfig(
        num_steps=1000,
        model=model,
        objective=SoftmaxClassification(),
        data=Stream(
            source=Tfds(dataset="imagenet2012", split="train"),
            ops=(DecodeInceptionCrop(size_px=224),),
            batch_size=chosen.batch,
        ),
        preprocess=(Decode(), ResizeSmall(size_px=256), CentralCrop(size_px=224)),
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=100)),
        mesh=Mesh(fsdp=chosen.fsdp),
        micro_batches=chosen.parts,
    )
