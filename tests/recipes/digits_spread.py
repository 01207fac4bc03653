"""Six steps of a tiny ViT for runs of several processes: dropout, EMA, one evaluator.

No mixup: the sampler of its beta distribution alone takes longer to compile than all
the rest of the step.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, RandomAffine, Resize
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `arg` is not used."""
    del arg
    return TrainConfig(
        num_steps=6,
        model=ViT(
            width=16,
            depth=1,
            mlp_dim=32,
            num_heads=2,
            patch_size=4,
            dropout=0.1,
            head=Classifier(num_classes=10),
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=Digits(split="train"),
            ops=(Decode(channels=1), RandomAffine(), Resize(size_px=8)),
            batch_size=64,
        ),
        preprocess=(Decode(channels=1), Resize(size_px=8)),
        optimizer=AdamW(schedule=WarmupCosine(peak=3e-3, warmup_steps=2)),
        evaluators={
            "test": Classification(
                source=Digits(split="test"), batch_size=64, every_steps=3
            ),
        },
        ema=Average(start=0.9),
        checkpoints=Checkpoints(every_steps=3, keep_latest=9),
        log_every_steps=1,
        platform=Platform.CPU,
    )
