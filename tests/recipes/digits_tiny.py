"""Sixteen steps of a tiny ViT with what has state: dropout, mixup, EMA, few-shot."""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, RandomAffine, Resize
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `arg` is not used."""
    del arg
    preprocess = (Decode(channels=1), Resize(size_px=8))
    return TrainConfig(
        num_steps=16,
        model=ViT(
            width=32,
            depth=1,
            mlp_dim=64,
            num_heads=2,
            patch_size=4,
            dropout=0.1,
            head=Classifier(num_classes=10),
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=Digits(split="train"),
            ops=(Decode(channels=1), RandomAffine(), Resize(size_px=8)),
            device_ops=(Mixup(alpha=0.2, num_classes=10),),
            batch_size=64,
        ),
        preprocess=preprocess,
        optimizer=AdamW(schedule=WarmupCosine(peak=3e-3, warmup_steps=4)),
        evaluators={
            "test": Classification(
                source=Digits(split="test"), batch_size=64, every_steps=4
            ),
            "fewshot": FewShot(
                sets=(
                    FewShotSet(
                        name="digits",
                        train=Digits(split="train"),
                        test=Digits(split="test"),
                    ),
                ),
                shots=(1, 5),
                batch_size=64,
                every_steps=8,
            ),
        },
        ema=Average(start=0.9),
        checkpoints=Checkpoints(every_steps=4),
        log_every_steps=1,
    )
