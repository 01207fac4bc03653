"""ResNeXt-101 32xCd on images and their hashtags (arXiv:1805.00932).

  python -m big_vision_lite.train --config \
      configs/weak_tags.py:table=TABLE,image=file,tags=hashtags,vocabulary=VOCABULARY \
      --workdir runs/tags
  ... :table=T.parquet,...,channels=48,classes=17000,resample=square_root

table       paths and words of images, CSV, TSV, JSON lines or Parquet; `image` and
            `tags` its columns, `separator` between words, `root` where paths begin
vocabulary  which words count and which mean one tag, `classes` their number; made by
            python tools/prepare_dataset.py tags --table T --synonyms S --min_count N
channels    C of 32xCd: 4, 8, 16, 32 or 48
resample    natural, square_root or uniform, below the frequency `threshold`, a share
noise       the share of the tags that chance replaces
epochs, batch

Each of an image's k tags has the target 1 / k. SGD with Nesterov momentum, 0.1 at
batch 256 scaled to 8064, warmed up from 0 and halved ten times; statistics of batch
norm over 24 images, as on the paper's 336 GPUs. The paper's 1e-4 of weight decay is
coupled with the gradient, so that momentum multiplies it by 10: see configs/bit_i1k.py.
Held-out tags are scored by whether the first prediction is among an image's.
Published: fine-tuned on ImageNet-1k at 224 px from 940 million images and 1,500 tags,
single crop: 82.2 (32x8d), 84.2 (32x16d), 85.1 (32x32d), 85.4 % (32x48d; the paper's
abstract, the others from the page of the released weights). Ours: not yet run.
Hardware: the paper's 336 GPUs; ours not yet measured.
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
from big_vision_lite.data.sources import Frequency, LabelKind, Resampled, Table, Tags
from big_vision_lite.data.sources.table import SEPARATOR
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import StepDrops
from big_vision_lite.training.optimizers import SGD

# Table of ResNeXt-101 32xCd in the paper.
CHANNELS = (4, 8, 16, 32, 48)
# Images whose statistics a GPU of the paper computes.
NORM_IMAGES = 24
DROPS = 10


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; the table is read when the run starts."""
    chosen = parse_arg(
        arg,
        table=str,
        vocabulary=str,
        image="image",
        tags="tags",
        root="",
        separator=SEPARATOR,
        classes=1500,
        channels=16,
        resample=Frequency.SQUARE_ROOT,
        threshold=0.0,
        noise=0.0,
        epochs=2.0,
        batch=8064,
        size=224,
    )
    if chosen.channels not in CHANNELS:
        raise ValueError(
            f"channels={chosen.channels} is not of the paper; use one of "
            f"{', '.join(map(str, CHANNELS))}."
        )

    def tagged(split: str, noise: float = 0.0) -> Tags:
        table = Table(
            path=chosen.table,
            image=chosen.image,
            label=(chosen.tags,),
            kind=LabelKind.TAGS,
            root=chosen.root or None,
            split=split,
            held_out=0.01,
            separator=chosen.separator,
        )
        return Tags(source=table, vocabulary=chosen.vocabulary, noise=noise)

    peak = 0.1 * chosen.batch / 256
    return TrainConfig(
        num_epochs=chosen.epochs,
        model=ResNet(
            stages=(3, 4, 23, 3),
            groups=32,
            width_per_group=chosen.channels,
            statistics_groups=max(1, chosen.batch // NORM_IMAGES),
            head=Classifier(num_classes=chosen.classes),
            dtype=Dtype.BFLOAT16,
        ),
        objective=SoftmaxClassification(share_labels=True),
        data=Stream(
            source=Resampled(
                source=tagged("train", chosen.noise),
                frequency=chosen.resample,
                threshold=chosen.threshold or None,
            ),
            ops=(DecodeInceptionCrop(size_px=chosen.size), FlipLeftRight()),
            batch_size=chosen.batch,
        ),
        preprocess=(
            Decode(),
            ResizeSmall(size_px=chosen.size * 8 // 7),
            CentralCrop(size_px=chosen.size),
        ),
        optimizer=SGD(
            schedule=StepDrops(
                peak=peak,
                warmup_steps=1400,
                drop_fractions=tuple(n / (DROPS + 1) for n in range(1, DROPS + 1)),
                factor=0.5,
            ),
            nesterov=True,
            weight_decay=1e-4 * peak / (1 - 0.9),
            clip_norm=None,
        ),
        evaluators={
            "val": Classification(
                source=tagged("val"), batch_size=1024, every_steps=10_000
            )
        },
        checkpoints=Checkpoints(every_steps=5000),
    )
