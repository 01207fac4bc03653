"""A small ViT (width 192, depth 6, patch 7) on Fashion-MNIST.

  python -m big_vision_lite.train --config configs/fashion_mnist.py:data_dir=DATA_DIR \
      --workdir runs/fashion
  ... --config configs/fashion_mnist.py:data_dir=DATA_DIR,epochs=10

DATA_DIR holds the prepared TFDS set (tools/prepare_dataset.py tfds fashion_mnist).
Published: big_vision's ViT of this size with Adam 1e-3, decay 1e-4, 5 % warm-up and
cosine reached 81.3 % after one epoch in one run. Ours: 83.6 +- 0.3 % (three seeds)
after one epoch, 88.8 % (one seed) after ten.
Hardware: 2 CPU cores, 2.7 minutes an epoch.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW

BATCH_SIZE = 128
STEPS_PER_EPOCH = round(60_000 / BATCH_SIZE)


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `epochs` sets its length, `data_dir` where the set lies."""
    chosen = parse_arg(arg, epochs=1, data_dir="")
    num_steps = chosen.epochs * STEPS_PER_EPOCH

    def fashion(split: str) -> Tfds:
        return Tfds(
            dataset="fashion_mnist", split=split, data_dir=chosen.data_dir or None
        )

    return TrainConfig(
        num_epochs=float(chosen.epochs),
        model=ViT(
            width=192,
            depth=6,
            mlp_dim=768,
            num_heads=3,
            patch_size=7,
            head=Classifier(num_classes=10),
        ),
        objective=SoftmaxClassification(),
        data=Stream(
            source=fashion("train"),
            ops=(Decode(channels=1),),
            batch_size=BATCH_SIZE,
        ),
        # The data are of this size; images that are predicted may be of any. Resized
        # as PIL does it, the model sees the same in timm and Hugging Face.
        preprocess=(
            Decode(channels=1),
            Resize(size_px=28, resampling=Resampling.PIL_BILINEAR),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=num_steps // 20),
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        evaluators={
            "test": Classification(
                source=fashion("test"), batch_size=500, every_steps=STEPS_PER_EPOCH
            ),
        },
        checkpoints=Checkpoints(every_steps=200),
        log_every_steps=20,
    )
