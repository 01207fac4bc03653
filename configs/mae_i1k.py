"""ViT-B/16 by masked autoencoding on ImageNet-1k without labels (arXiv:2111.06377).

  python -m big_vision_lite.train --config configs/mae_i1k.py:data_dir=DATA_DIR \
      --workdir runs/mae
  ... --config configs/mae_i1k.py:size=L/16,data_dir=DATA_DIR
  ... --config configs/mae_i1k.py:pixio=true,data_dir=DATA_DIR

DATA_DIR holds imagenet2012 as TensorFlow Datasets prepares it; without the argument
$TFDS_DATA_DIR or ~/tensorflow_datasets do. `pixio=true` hides squares of 4 x 4 patches
at 256 px and gives the encoder 8 class tokens and the decoder 32 blocks
(arXiv:2512.15715 and its published scripts; learning rate and length stay MAE's).
Table 8 of the paper: AdamW (0.9, 0.95), learning rate 1.5e-4 * 4096 / 256, decay 0.05
times that, 40 epochs of warm-up, crops of at least a fifth and flips, batch 4096.
Published, after 1600 epochs: fine-tuned 83.6 % (B/16) and 85.9 (L/16), linear 68.0 and
75.8. Ours: not yet run.
Hardware: a TPU slice or eight GPUs; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import CentralCrop, Decode, FlipLeftRight, ResizeSmall
from big_vision_lite.data.ops.geometry import RandomResizedCrop
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.evaluators.online_probe import OnlineProbe
from big_vision_lite.evaluators.reconstructions import Reconstructions
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.reconstruction import MaskedReconstruction
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW

BATCH_SIZE = 4096
STEPS_PER_EPOCH = round(1_281_167 / BATCH_SIZE)
PEAK = 1.5e-4 * BATCH_SIZE / 256


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `size` names a ViT, `pixio` hides larger blocks."""
    chosen = parse_arg(arg, size="B/16", pixio=False, data_dir="")

    def imagenet(split: str, labels: bool = True) -> Tfds:
        return Tfds(
            dataset="imagenet2012",
            split=split,
            data_dir=chosen.data_dir or None,
            label_key="label" if labels else None,
        )

    # ImageNet's mean and deviation, times 255.
    constants = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    encoder = ViT.of(
        chosen.size,
        pooling=Pooling.CLASS_TOKEN,
        class_tokens=8 if chosen.pixio else 1,
        dtype=Dtype.BFLOAT16,
        **constants,
    )
    size_px = 256 if chosen.pixio else 224
    val = imagenet("validation")
    return TrainConfig(
        num_epochs=800.0,
        model=MaskedAutoencoder(
            encoder=encoder,
            decoder_width=512,
            decoder_depth=32 if chosen.pixio else 8,
            decoder_heads=16,
            mask_block=4 if chosen.pixio else 1,
        ),
        objective=MaskedReconstruction(),
        data=Stream(
            source=imagenet("train", labels=False),
            ops=(
                Decode(),
                RandomResizedCrop(
                    size_px=size_px, area_min=0.2, resampling=Resampling.PIL_BICUBIC
                ),
                FlipLeftRight(),
            ),
            batch_size=BATCH_SIZE,
        ),
        preprocess=(
            Decode(),
            ResizeSmall(size_px=size_px * 8 // 7),
            CentralCrop(size_px=size_px),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=PEAK, warmup_steps=40 * STEPS_PER_EPOCH),
            beta2=0.95,
            weight_decay=0.05 * PEAK,
            clip_norm=None,
        ),
        evaluators={
            "loss": Loss(source=val, batch_size=1024, every_steps=5000),
            "pictures": Reconstructions(
                source=imagenet("validation[:1024]"), batch_size=1024, every_steps=5000
            ),
            "probe": OnlineProbe(
                train=imagenet("train[:20000]"),
                test=imagenet("validation[:5000]"),
                batch_size=1024,
                every_steps=5000,
            ),
        },
        checkpoints=Checkpoints(every_steps=1000),
    )
