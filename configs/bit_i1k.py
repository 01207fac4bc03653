"""BiT ResNet-50x1 on ImageNet-1k, after "Big Transfer" (arXiv:1912.11370), BiT-S.

  python -m big_vision_lite.train --config configs/bit_i1k.py:data_dir=DATA_DIR \
      --workdir runs/bit
  ... --config configs/bit_i1k.py:data_dir=DATA_DIR,size=R101x1

DATA_DIR holds imagenet2012 as TensorFlow Datasets prepares it; without the argument
$TFDS_DATA_DIR or ~/tensorflow_datasets do.

Settings: section 3.1 of the paper for ILSVRC-2012: SGD with momentum, 0.03 at batch
256 scaled to 4096, 5,000 steps of warm-up, 90 epochs with drops by 10 after 30, 60 and
80, weight decay 1e-4. The paper's code couples decay with the gradient, so that
momentum multiplies it by 10; decoupled that is 10 * 1e-4 times the learning rate, the
number that big_vision uses for ImageNet-21k (3e-5 * 16).
Published: no accuracy for exactly this recipe; big_vision's variant of it (cosine, 0.1
at batch 256) takes about 32 minutes on a TPU v3-128. Ours: not yet run.
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
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import StepDrops
from big_vision_lite.training.optimizers import SGD

BATCH_SIZE = 4096
PEAK = 0.03 * BATCH_SIZE / 256


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `size` is a BiT size such as R50x1 or R152x4."""
    chosen = parse_arg(arg, size="R50x1", data_dir="")

    def imagenet(split: str) -> Tfds:
        return Tfds(
            dataset="imagenet2012", split=split, data_dir=chosen.data_dir or None
        )

    return TrainConfig(
        num_epochs=90.0,
        model=BiT.of(
            chosen.size, head=Classifier(num_classes=1000), dtype=Dtype.BFLOAT16
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=imagenet("train[:99%]"),
            ops=(DecodeInceptionCrop(size_px=224), FlipLeftRight()),
            batch_size=BATCH_SIZE,
        ),
        preprocess=(Decode(), ResizeSmall(size_px=256), CentralCrop(size_px=224)),
        optimizer=SGD(
            schedule=StepDrops(
                peak=PEAK,
                warmup_steps=5000,
                drop_fractions=(30 / 90, 60 / 90, 80 / 90),
            ),
            weight_decay=1e-4 * PEAK / (1 - 0.9),
            clip_norm=None,
        ),
        evaluators={
            "minival": Classification(
                source=imagenet("train[99%:]"), batch_size=1024, every_steps=2500
            ),
            "val": Classification(
                source=imagenet("validation"), batch_size=1024, every_steps=2500
            ),
        },
        checkpoints=Checkpoints(every_steps=1000),
    )
