"""Your own folder of images: from scratch, or better from a checkpoint.

  python -m big_vision_lite.train --config configs/folder.py:dir=DIR --workdir runs/mine
  ... --config configs/folder.py:dir=DIR,init=RUN --workdir runs/mine
  ... --config configs/folder.py:dir=DIR,init=RUN,size=224,batch=64,steps=1000

dir       DIR/CLASS/**, a tenth of each class is held out as val; or
          DIR/{train,val,test}/CLASS/**, by other names (Training, test_set), too; jpg,
          jpeg, jfif, jpe, png, webp, bmp, gif, and tif, avif where Pillow reads them
init      a run, checkpoints or step folder: its weights, fine-tuned by BiT-HyperRule
          with a new head; without it a small BiT ResNet from scratch
size      pixels; 0: what the run was trained at, from scratch 64
batch     images a step; 0: 128, or less where there are fewer images
epochs    from scratch, 0: 100
steps     from a checkpoint, 0: by the number of images, 500, 10,000 or 20,000
flip      false where left and right mean something
split_seed  which tenth is held out, where there are no split folders
classes   a,b,c: names and order; these folders are classes, whatever their names mean
allow_module  a module of your own that the run's model comes from

The folder is listed when the run starts; the class names go into config.json. From
scratch a few hundred images a class are a minimum; a checkpoint needs a few.
Published: none, every folder is another. Ours: not yet run.
Hardware: from scratch at 64 px a CPU will do; hours not yet measured.
"""

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    FlipLeftRight,
    ResizeSmall,
)
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.data.sources.folder import open_folder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import HyperRule, parse_size, read_run, start
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator

# The largest size at which the small network sees the whole of an object.
SMALL_NETWORK_PX = 64


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; lists the folder."""
    chosen = parse_arg(
        arg,
        dir=str,
        init="",
        size=0,
        batch=0,
        epochs=0.0,
        steps=0,
        flip=True,
        split_seed=0,
        classes="",
        allow_module="",
    )
    splits = open_folder(chosen.dir, chosen.split_seed, chosen.classes)
    train = splits.pop("train")
    if chosen.init:
        return from_checkpoint(chosen, train, splits)
    return from_scratch(chosen, train, splits)


def from_checkpoint(
    chosen, train: ImageFolder, others: dict[str, ImageFolder]
) -> TrainConfig:
    """Fine-tunes by the rule at batch 128, whose learning rate is 0.001."""
    if chosen.epochs:
        raise ValueError("epochs is for training from scratch; with init use steps.")
    pretrained = read_run(chosen.init, chosen.allow_module)
    batch_size = chosen.batch or 128
    rule = HyperRule(
        size_px=parse_size(str(chosen.size or "keep"), train, pretrained),
        num_steps=chosen.steps or None,
        peak=0.003 if batch_size >= 512 else 0.001,
        batch_size=batch_size,
        flip=chosen.flip,
    )
    num_steps, _ = rule.schedule(len(train))
    return rule.config(
        pretrained.model,
        train,
        scored(others, every_steps=max(1, num_steps // 10)),
        pretrained.preprocess,
        init=start(chosen.init, pretrained.model),
    )


def from_scratch(
    chosen, train: ImageFolder, others: dict[str, ImageFolder]
) -> TrainConfig:
    """Trains a small network on crops with mixup, what little data needs."""
    if chosen.steps or chosen.allow_module:
        raise ValueError("steps and allow_module go with init; use epochs.")
    size, num_classes = chosen.size or 64, len(train.class_names)
    # A power of two, for any number of devices.
    fitting = 1 << (len(train).bit_length() - 1)
    batch_size = chosen.batch or min(128, fitting)
    epochs = chosen.epochs or 100.0
    num_steps = max(1, round(epochs * len(train) / batch_size))
    head = Classifier(num_classes=num_classes)
    flip = (FlipLeftRight(),) if chosen.flip else ()
    return TrainConfig(
        num_epochs=epochs,
        model=BiT.of("small" if size <= SMALL_NETWORK_PX else "R26x1", head=head),
        objective=SoftmaxClassification(),
        data=Stream(
            source=train,
            ops=(DecodeInceptionCrop(size_px=size, area_min=0.25), *flip),
            device_ops=(Mixup(num_classes=num_classes, alpha=0.2),),
            batch_size=batch_size,
        ),
        preprocess=(
            Decode(),
            ResizeSmall(size_px=round(size * 8 / 7)),
            CentralCrop(size_px=size),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=num_steps // 20),
            weight_decay=1e-4,
        ),
        evaluators=scored(others, every_steps=max(1, num_steps // 20)),
    )


def scored(others: dict[str, ImageFolder], every_steps: int) -> dict[str, Evaluator]:
    """Returns an evaluator a split."""
    return {
        name: Classification(source=source, every_steps=every_steps, batch_size=128)
        for name, source in others.items()
    }
