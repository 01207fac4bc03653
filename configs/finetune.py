"""Fine-tunes a run on another labelled set by BiT-HyperRule, with a new head.

  python -m big_vision_lite.train --config configs/finetune.py:init=RUN,data=FOLDER \
      --workdir runs/finetuned
  ... --config configs/finetune.py:init=RUN,tfds=oxford_iiit_pet,data_dir=DATA_DIR
  ... --config configs/finetune.py:init=RUN,data=FOLDER,size=keep,batch=128,peak=0.001

init      a run folder, its checkpoints folder or one step folder
data      a folder, FOLDER/CLASS/** or FOLDER/{train,val,test}/CLASS/**; or
tfds      a prepared TFDS set in data_dir, its splits named by train and test
size      rule: by the area of the images, 128 or 480 px; keep: what the run was trained
          at, for small images above all; or a number of pixels
batch     images a step; the rule's learning rate is for 512, peak=0.001 goes with 128
steps     0: by the number of training images, 500, 10,000 or 20,000
flip      false where left and right mean something
split_seed  which tenth of data is held out, where there are no split folders
classes   a,b,c of data: names and order, whatever the folders' names mean
allow_module  a module of your own that the run's model comes from
part      of a file of another library with several models one: teacher

The rule is in big_vision_lite/runs/hyperrule.py; its settings are never chosen on
the test images, which are scored five times on the way for the curve only.
Published: BiT-M R152x4 (ImageNet-21k) 98.91 % on CIFAR-10, 92.17 on CIFAR-100, 94.47 on
Pets and 99.30 on Flowers; BiT-L (JFT-300M) 99.37, 93.51, 96.62 and 99.63
(arXiv:1912.11370, table 1). Ours: not yet run.
Hardware: any; hours not yet measured.
"""

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.sources import Tfds
from big_vision_lite.data.sources.folder import open_folder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import HyperRule, parse_size, read_run, start
from big_vision_lite.types import Evaluator


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; reads the run's config.json and opens the training set."""
    chosen = parse_arg(
        arg,
        init=str,
        data="",
        tfds="",
        data_dir="",
        train="train",
        test="test",
        size="rule",
        batch=512,
        steps=0,
        peak=0.003,
        flip=True,
        split_seed=0,
        classes="",
        allow_module="",
        part="",
    )
    if bool(chosen.data) == bool(chosen.tfds):
        raise ValueError(
            f'data="{chosen.data}" and tfds="{chosen.tfds}": give one of them, a '
            "folder of images or a prepared TFDS set."
        )
    if chosen.data:
        splits = open_folder(chosen.data, chosen.split_seed, chosen.classes)
    else:
        splits = {
            name: Tfds(
                dataset=chosen.tfds, split=part, data_dir=chosen.data_dir or None
            )
            for name, part in (("train", chosen.train), ("test", chosen.test))
        }
    train = splits.pop("train")
    pretrained = read_run(chosen.init, chosen.allow_module, chosen.part)
    rule = HyperRule(
        size_px=parse_size(chosen.size, train, pretrained),
        num_steps=chosen.steps or None,
        peak=chosen.peak,
        batch_size=chosen.batch,
        flip=chosen.flip,
    )
    num_steps, _ = rule.schedule(len(train))
    evaluators: dict[str, Evaluator] = {
        name: Classification(source=source, every_steps=max(1, num_steps // 5))
        for name, source in splits.items()
    }
    return rule.config(
        pretrained.model,
        train,
        evaluators,
        pretrained.preprocess,
        init=start(chosen.init, pretrained.model, chosen.part),
    )
