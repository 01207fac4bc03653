"""BiT R50x1 learns from a BiT-M R152x2 on ImageNet-1k, patiently (arXiv:2106.05237).

  python -m big_vision_lite.train \
      --config configs/distil_i1k.py:teacher=WEIGHTS,data_dir=DATA_DIR \
      --workdir runs/distilled

WEIGHTS is a BiT R152x2 with ImageNet-1k's classes: a run, or a file of another library
such as BiT-M-R152x2-ILSVRC2012.npz; any other classifier may teach, too. DATA_DIR holds
imagenet2012 as TensorFlow Datasets prepares it; without the argument $TFDS_DATA_DIR or
~/tensorflow_datasets do. Teacher and student see the same crop and the same mixture;
labels are not used. Section 3 and the published code: divergence at temperature 1,
mixup 1.0, Inception crops and flips at 224 px, Adam with a bfloat16 first moment,
learning rate 0.03, decay 3e-4, clip 1, 5,000 steps of warm-up, batch 4,096, 98 % of the
training images, 1,200 epochs.
Published, after 9,600 epochs: 82.8 %. Ours: not yet run.
Hardware: a TPU slice; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    FlipLeftRight,
    ResizeSmall,
)
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.objectives.distillation import LogitDistillation
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import read_run
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW, MomentumDtype


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; opens the teacher, whose classes are the student's."""
    chosen = parse_arg(arg, teacher=str, epochs=1200.0, data_dir="", allow_module="")
    teacher = read_run(chosen.teacher, chosen.allow_module).model
    if getattr(teacher, "head", None) is None:
        raise ValueError(
            f"{chosen.teacher} has no head, and a student learns its probabilities; "
            "give a classifier, or distil features: configs/distil.py."
        )

    def imagenet(split: str, labels: bool = True) -> Tfds:
        return Tfds(
            dataset="imagenet2012",
            split=split,
            data_dir=chosen.data_dir or None,
            label_key="label" if labels else None,
        )

    student = BiT.of(
        "R50x1",
        head=Classifier(num_classes=teacher.head.num_classes),
        dtype=Dtype.BFLOAT16,
    )
    return TrainConfig(
        num_epochs=chosen.epochs,
        model=Distilled(student=student, teachers=(teacher,)),
        objective=LogitDistillation(),
        data=Stream(
            source=imagenet("train[:98%]", labels=False),
            ops=(DecodeInceptionCrop(size_px=224), FlipLeftRight()),
            device_ops=(Mixup(num_classes=None, alpha=1.0),),
            batch_size=4096,
        ),
        preprocess=(Decode(), ResizeSmall(size_px=256), CentralCrop(size_px=224)),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=0.03, warmup_steps=5000),
            weight_decay=3e-4,
            clip_norm=1.0,
            momentum_dtype=MomentumDtype.BFLOAT16,
        ),
        evaluators={
            name: Classification(
                source=imagenet(split), batch_size=1024, every_steps=5000
            )
            for name, split in (("minival", "train[98%:]"), ("val", "validation"))
        },
        init=(Init(path=chosen.teacher, into="teachers_0"),),
        freeze=("teachers_.*",),
        checkpoints=Checkpoints(every_steps=1000),
    )
