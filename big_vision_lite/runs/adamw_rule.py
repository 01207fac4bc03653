"""Fine-tuning of transformers by AdamW with layer decay, after BEiT and MAE."""

import dataclasses
import math
from typing import Any

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runs.hyperrule import Repeated, with_head
from big_vision_lite.runtime.sharding import Mesh
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator, Objective, Op, Source


@dataclasses.dataclass(kw_only=True)
class AdamWRule:
    """AdamW, cosine to 0, label smoothing; lower blocks learn more slowly.

    After arXiv:2111.06377, table 9 (layer decay 0.75, smoothing 0.1, weight decay
    0.05 times the learning rate). `weight_decay` is in the unit of `AdamW`, `warmup` a
    fraction of `num_steps`. The training that starts from random parameters has no
    layer decay, which would only hold it back. `ops` make training images from files,
    `preprocess` evaluation images; None takes what the pretrained model's images got,
    for both.
    """

    num_steps: int
    batch_size: int = 128
    peak: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 5e-5
    layer_decay: float | None = 0.75
    label_smoothing: float = 0.1
    ops: tuple[Op, ...] | None = None
    preprocess: tuple[Op, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"AdamWRule(num_steps={self.num_steps}, batch_size={self.batch_size}, "
                f"warmup={self.warmup}): the first two are at least 1, warmup is a "
                "share below 1, 0.1 for example."
            )

    def config(
        self,
        model: Any,
        train: Source,
        evaluators: dict[str, Evaluator],
        pretrained_preprocess: tuple[Op, ...],
        *,
        init: tuple[Init, ...],
        objective: Objective | None = None,
        seed: int = 0,
        fsdp: int = 1,
    ) -> TrainConfig:
        """Returns the config that trains `model` with a new head for `train`'s classes.

        Raises:
            ValueError: the model has no field for a head.
        """
        source = train
        if len(train) < self.batch_size:
            times = math.ceil(self.batch_size / max(1, len(train)))
            source = Repeated(source=train, times=times)
        default = SoftmaxClassification(label_smoothing=self.label_smoothing)
        ops = pretrained_preprocess if self.ops is None else self.ops
        preprocess = self.preprocess or pretrained_preprocess
        return TrainConfig(
            seed=seed,
            num_steps=self.num_steps,
            model=with_head(model, len(train.class_names)),
            objective=objective or default,
            data=Stream(source=source, ops=ops, batch_size=self.batch_size),
            preprocess=preprocess,
            optimizer=AdamW(
                schedule=WarmupCosine(
                    peak=self.peak, warmup_steps=round(self.warmup * self.num_steps)
                ),
                weight_decay=self.weight_decay,
                layer_decay=self.layer_decay,
            ),
            evaluators=evaluators,
            init=init,
            mesh=Mesh(fsdp=fsdp),
            checkpoints=Checkpoints(every_steps=min(1000, self.num_steps)),
        )

    def from_scratch(self, config: TrainConfig) -> TrainConfig:
        """Returns the training from random parameters: without layer decay."""
        optimizer: Any = config.optimizer
        plain = dataclasses.replace(optimizer, layer_decay=None)
        return dataclasses.replace(config, init=(), optimizer=plain)
