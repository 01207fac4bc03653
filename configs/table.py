"""Your own table of labels: one class an image, several, or numbers (regression).

  python -m big_vision_lite.train --config \
      configs/table.py:table=labels.csv,image=file,label=class --workdir runs/mine
  ... --config configs/table.py:table=T.csv,image=file,label=age,kind=numbers,init=RUN
  ... --config configs/table.py:table=T.csv,image=file,label=a,b,kind=flags,split=part

table     CSV, TSV, JSON lines or Parquet, told by the suffix
image     the column with the paths of the images
root      the folder that these paths begin in; without it that of the table
label     the column, or columns, of the labels: label=height,weight
kind      class: one class an image; classes: several names in a cell; flags: columns of
          0 and 1, one a class; numbers: columns of numbers to predict
separator  between several names in a cell
split     the column that holds train, val and test; without it a share is held out
held_out  that share
loss      of numbers: squared, absolute or huber
class_weights  of classes: balanced makes each weigh alike in the loss, however few its
          images
init, size, batch, epochs, steps, flip, orientation, split_seed, allow_module
          as in configs/folder.py: init=RUN fine-tunes, without it from scratch

The table is read when the run starts; the class names, or mean and deviation of every
number, go into config.json. One class is trained with the softmax and scored by
accuracy, several with the sigmoid and by mean average precision, numbers by R2, MAE,
RMSE and Spearman beside their mean; predict writes them in their own units.
Published: none, every table is another. Ours: not yet run.
Hardware: from scratch at 64 px a CPU will do; hours not yet measured.
"""

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.sources import LabelKind, Table
from big_vision_lite.data.sources.table import HELD_OUT, SEPARATOR, table_splits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.regression import Regression as RegressionScores
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.objectives.regression import Regression, RegressionLoss
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs import own_images
from big_vision_lite.runs.own_images import ClassWeights
from big_vision_lite.types import Evaluator, Objective


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; reads the table."""
    chosen = parse_arg(
        arg,
        table=str,
        image=str,
        label=str,
        kind=LabelKind.CLASS,
        root="",
        separator=SEPARATOR,
        split="",
        held_out=HELD_OUT,
        loss=RegressionLoss.SQUARED,
        class_weights=ClassWeights.EQUAL,
        **own_images.ARGUMENTS,
    )
    if chosen.kind == LabelKind.TAGS:
        raise ValueError(
            "kind=tags needs a vocabulary: take configs/weak_tags.py, or kind=classes, "
            "which counts every word."
        )
    table = Table(
        path=chosen.table,
        image=chosen.image,
        label=tuple(name.strip() for name in chosen.label.split(",")),
        kind=chosen.kind,
        root=chosen.root or None,
        split_column=chosen.split or None,
        held_out=chosen.held_out,
        split_seed=chosen.split_seed,
        separator=chosen.separator,
    )
    splits = table_splits(table)
    train = splits.pop("train")

    def scored(every_steps: int) -> dict[str, Evaluator]:
        numbers = chosen.kind == LabelKind.NUMBERS
        score = RegressionScores if numbers else Classification
        return {
            name: score(source=source, every_steps=every_steps, batch_size=128)
            for name, source in splits.items()
        }

    objective = objective_of(train, chosen.loss, chosen.class_weights)
    return own_images.recipe(chosen, train, objective, scored)


def objective_of(
    train: Table, loss: RegressionLoss, class_weights: ClassWeights
) -> Objective:
    """Returns the objective for the kind of labels; of numbers it knows their units."""
    balanced = class_weights == ClassWeights.BALANCED
    if train.kind == LabelKind.NUMBERS:
        if balanced:
            raise ValueError(
                "class_weights=balanced is for classes, and kind=numbers has none. "
                "Leave it out."
            )
        return Regression.fitted(train.targets, train.class_names, loss)
    if loss != RegressionLoss.SQUARED:
        raise ValueError(
            f"loss={loss} is for kind=numbers; classes are trained with the softmax or "
            "the sigmoid. Leave it out."
        )
    names = train.class_names
    if train.kind == LabelKind.CLASS:
        if balanced:
            return SoftmaxClassification.balanced(train.class_counts(), names)
        return SoftmaxClassification()
    if balanced:
        counts = train.class_counts()
        return SigmoidClassification.balanced(counts, names, len(train))
    return SigmoidClassification()
