"""ViT-S/16 on ImageNet-1k, after "Better plain ViT baselines" (arXiv:2205.01580).

  python -m big_vision_lite.train --config configs/vit_s16_i1k.py:data_dir=DATA_DIR \
      --workdir runs/s16
  ... --config.num_epochs=300

DATA_DIR holds imagenet2012 as TensorFlow Datasets prepares it; without the argument
$TFDS_DATA_DIR or ~/tensorflow_datasets do. `fewshot=true` takes its sets from there,
too.
Published: 76.5 / 78.5 / 80.0 % top-1 after 90 / 150 / 300 epochs at global batch 1024;
90 epochs took 6 to 7 hours on a TPU v3-8 (big_vision). Ours: not yet run.
Hardware: eight GPUs or a TPU slice; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    FlipLeftRight,
    ResizeSmall,
)
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.ops.randaugment import RandAugment
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, natural_sets
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW, MomentumDtype


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `size` in px, `fewshot` adds the natural few-shot sets."""
    chosen = parse_arg(arg, size=224, fewshot=False, data_dir="")
    data_dir = chosen.data_dir or None

    def imagenet(split: str) -> Tfds:
        return Tfds(dataset="imagenet2012", split=split, data_dir=data_dir)

    evaluators = {
        "minival": Classification(
            source=imagenet("train[99%:]"), batch_size=1024, every_steps=2500
        ),
        "val": Classification(
            source=imagenet("validation"), batch_size=1024, every_steps=2500
        ),
    }
    if chosen.fewshot:
        evaluators["fewshot"] = FewShot(sets=natural_sets(data_dir), every_steps=25_000)
    return TrainConfig(
        num_epochs=90.0,
        model=ViT.of(
            "S/16",
            head=Classifier(num_classes=1000, hidden_dim=384),
            dtype=Dtype.BFLOAT16,
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=imagenet("train[:99%]"),
            ops=(
                DecodeInceptionCrop(size_px=chosen.size),
                FlipLeftRight(),
                RandAugment(num_layers=2, magnitude=10),
            ),
            device_ops=(Mixup(alpha=0.2, num_classes=1000),),
            batch_size=1024,
        ),
        preprocess=(
            Decode(),
            ResizeSmall(size_px=chosen.size * 256 // 224),
            CentralCrop(size_px=chosen.size),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=10_000),
            weight_decay=1e-4,
            clip_norm=1.0,
            momentum_dtype=MomentumDtype.BFLOAT16,
        ),
        evaluators=evaluators,
        checkpoints=Checkpoints(every_steps=1000),
    )
