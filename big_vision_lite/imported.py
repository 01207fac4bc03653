"""The recipe of weights that were trained elsewhere: it describes and evaluates."""

from big_vision_lite.config import TrainConfig
from big_vision_lite.conversion.foreign import Foreign
from big_vision_lite.data.no_images import NoImages
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.optimizers import AdamW
from big_vision_lite.schedules import WarmupCosine


def recipe(found: Foreign) -> TrainConfig:
    """Returns a configuration with the model and its preprocessing, and no images.

    It can be evaluated, predicted with and started from, not trained.
    """
    return TrainConfig(
        num_steps=1,
        model=found.model,
        objective=SoftmaxClassification(),
        data=Stream(
            source=NoImages(classes=found.class_names, origin=found.path),
            ops=found.preprocess,
            batch_size=1,
        ),
        preprocess=found.preprocess,
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=0)),
    )
