"""Any backbone teaches any other, on your folder of images, without labels.

  python -m big_vision_lite.train \
      --config configs/distil.py:teacher=WEIGHTS,student=ViT:S/16,data=FOLDER \
      --workdir runs/distilled
  ... --config configs/distil.py:teacher=RUN,student=ResNet:R50,data=FOLDER,size=128

teacher   a run, a step folder, or weights of timm, torchvision or Hugging Face; several
          joined by +
student   FAMILY:SIZE of a model of the package (tools/show_model.py lists them)
data      a folder of images at any depth; labels, if there are folders of them, are not
          used
method    features: the student's features are drawn to those of each teacher, through
          an adaptor of its own (1 - cosine, arXiv:2312.06709); phi_s: the same, by
          squares of features that PHI-S standardises (arXiv:2410.01680), so that no
          teacher outweighs another; queue: they get the neighbours that the teacher
          finds among the last `queue` images (after arXiv:2101.04731)
size      px of the images that the student sees; 0: what the first teacher was trained
          at; teachers of another size see them resized
batch, epochs, peak  images a step, length, learning rate
allow_module  a module of your own that a teacher's run comes from

Only the student is kept. The preprocessing recorded with the student is that of the
first teacher.
Published: none for this form. Ours: not yet run.
Hardware: any; hours not yet measured.
"""

from typing import Any

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import DecodeInceptionCrop, FlipLeftRight
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.distillation import (
    Distance,
    FeatureDistillation,
    QueueDistillation,
)
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import input_shape, read_run
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW

FAMILIES = {"BiT": BiT, "MlpMixer": MlpMixer, "ResNet": ResNet, "ViT": ViT}

METHODS = {
    "features": FeatureDistillation(),
    "phi_s": FeatureDistillation(distance=Distance.PHI_S),
    "queue": QueueDistillation(),
}


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; opens the teachers and lists the folder."""
    chosen = parse_arg(
        arg,
        teacher=str,
        student=str,
        data=str,
        method="features",
        size=0,
        queue=8192,
        batch=128,
        epochs=100.0,
        peak=1e-3,
        allow_module="",
    )
    if chosen.method not in METHODS:
        raise ValueError(
            f"method={chosen.method} is unknown; use one of {', '.join(METHODS)}."
        )
    paths = chosen.teacher.split("+")
    teachers = [read_run(path, chosen.allow_module) for path in paths]
    train, val = (
        ImageFolder(path=chosen.data, split=split, labels=False)
        for split in ("train", "val")
    )
    shapes = [input_shape(train, teacher.preprocess) for teacher in teachers]
    size_px = chosen.size or shapes[0][0]
    channels = shapes[0][-1]
    num_steps = max(10, round(chosen.epochs * len(train) / chosen.batch))
    resized = tuple(shape[0] for shape in shapes)
    return TrainConfig(
        num_epochs=chosen.epochs,
        model=Distilled(
            student=student_of(chosen.student),
            teachers=tuple(teacher.model for teacher in teachers),
            teacher_size_px=() if set(resized) == {size_px} else resized,
            adaptors=True,
            standardise_steps=max(1, num_steps // 100)
            if chosen.method == "phi_s"
            else 0,
            queue_length=min(chosen.queue, len(train))
            if chosen.method == "queue"
            else 0,
        ),
        objective=METHODS[chosen.method],
        data=Stream(
            source=train,
            ops=(
                DecodeInceptionCrop(size_px=size_px, channels=channels, area_min=0.25),
                FlipLeftRight(),
            ),
            device_ops=(Mixup(num_classes=None, alpha=1.0),),
            batch_size=chosen.batch,
        ),
        preprocess=teachers[0].preprocess,
        optimizer=AdamW(
            schedule=WarmupCosine(peak=chosen.peak, warmup_steps=num_steps // 20),
            weight_decay=1e-4,
        ),
        evaluators={"val": Loss(source=val, every_steps=max(10, num_steps // 10))},
        init=tuple(
            Init(path=path, into=f"teachers_{index}")
            for index, path in enumerate(paths)
        ),
        freeze=("teachers_.*",),
        checkpoints=Checkpoints(every_steps=500),
    )


def student_of(name: str) -> Any:
    """Returns a model of the package by "FAMILY:SIZE"."""
    family, _, size = name.partition(":")
    if family not in FAMILIES or not size:
        raise ValueError(
            f'student="{name}" is no FAMILY:SIZE; for example '
            f"ViT:S/16, with a family of {', '.join(FAMILIES)}."
        )
    return FAMILIES[family].of(size)
