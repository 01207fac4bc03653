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
orientation  apply: photographs are turned as their EXIF says; ignore: as stored, what
          big_vision, timm and torchvision train on (with init what the run did)
split_seed  which tenth is held out, where there are no split folders
classes   a,b,c: names and order; these folders are classes, whatever their names mean
class_weights  balanced: each class weighs alike in the loss, however few its images
allow_module  a module of your own that the run's model comes from
part      of a file of another library with several models one: teacher

The folder is listed when the run starts; the class names go into config.json. From
scratch a few hundred images a class are a minimum; a checkpoint needs a few.
Published: none, every folder is another. Ours: not yet run.
Hardware: from scratch at 64 px a CPU will do; hours not yet measured.
"""

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.sources.folder import open_folder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs import own_images
from big_vision_lite.runs.own_images import ClassWeights
from big_vision_lite.types import Evaluator


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; lists the folder."""
    chosen = parse_arg(
        arg,
        dir=str,
        classes="",
        class_weights=ClassWeights.EQUAL,
        **own_images.ARGUMENTS,
    )
    splits = open_folder(chosen.dir, chosen.split_seed, chosen.classes)
    train = splits.pop("train")
    objective = SoftmaxClassification()
    if chosen.class_weights == ClassWeights.BALANCED:
        objective = objective.balanced(train.class_counts(), train.class_names)

    def scored(every_steps: int) -> dict[str, Evaluator]:
        return {
            name: Classification(source=source, every_steps=every_steps, batch_size=128)
            for name, source in splits.items()
        }

    return own_images.recipe(chosen, train, objective, scored)
