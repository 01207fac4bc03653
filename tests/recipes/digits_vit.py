"""A tiny ViT that timm and Hugging Face have, too: class token, learned positions."""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `arg` is not used."""
    del arg
    return TrainConfig(
        num_steps=40,
        model=ViT(
            width=32,
            depth=2,
            mlp_dim=64,
            num_heads=2,
            patch_size=2,
            pooling=Pooling.CLASS_TOKEN,
            positions=Positions.LEARNED,
            head=Classifier(num_classes=10),
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=Digits(split="train"), ops=(Decode(channels=1),), batch_size=64
        ),
        preprocess=(
            Decode(channels=1),
            Resize(size_px=8, resampling=Resampling.PIL_BILINEAR),
        ),
        optimizer=AdamW(schedule=WarmupCosine(peak=3e-3, warmup_steps=3)),
        evaluators={
            "test": Classification(
                source=Digits(split="test"), batch_size=64, every_steps=40
            )
        },
        checkpoints=Checkpoints(every_steps=1000),
        log_every_steps=1,
    )
