"""A larger glyph network teaches a smaller one, on 1,000 images without labels.

  python -m big_vision_lite.train --config configs/glyphs_distil.py:data_dir=DATA_DIR \
      --workdir runs/alone
  ... --config configs/glyphs_distil.py:data_dir=DATA_DIR,teacher=runs/glyphs

DATA_DIR is that of configs/glyphs.py, which makes the teacher. With `teacher` the
student, two thirds as wide, learns its probabilities of the same distorted images (KL
at temperature 1); without it learns from their labels, which is the control.
`validation` may choose settings, `test` holds fonts that neither saw.
Published: none. Ours: not yet run.
Hardware: 2 CPU cores; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import Decode, RandomAffine, Resize
from big_vision_lite.data.ops.colour import RandomLowResolution
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.bit import BiT, Stem
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.distillation import LogitDistillation
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import read_run
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; without a `teacher` the student learns from labels alone."""
    chosen = parse_arg(
        arg,
        teacher="",
        data_dir="",
        dataset="glyphs32_latin",
        classes=62,
        steps=800,
        images=1000,
    )

    def glyphs(split: str) -> Tfds:
        return Tfds(
            dataset=chosen.dataset, split=split, data_dir=chosen.data_dir or None
        )

    to_size = Resize(size_px=32, resampling=Resampling.PIL_BILINEAR)
    head = Classifier(num_classes=chosen.classes)
    model = student = BiT.of("small", width=16, stem=Stem.MEDIUM, head=head)
    if chosen.teacher:
        teacher = read_run(chosen.teacher).model
        model = Distilled(student=student, teachers=(teacher,))
    return TrainConfig(
        num_steps=chosen.steps,
        model=model,
        objective=LogitDistillation() if chosen.teacher else SoftmaxClassification(),
        data=Stream(
            source=glyphs(f"train[:{chosen.images}]"),
            ops=(
                Decode(channels=1),
                to_size,
                RandomAffine(
                    degrees=10.0,
                    translate=0.08,
                    scale_min=0.85,
                    scale_max=1.4,
                    shear_degrees=8.0,
                ),
                RandomLowResolution(side_min_px=8),
            ),
            batch_size=128,
        ),
        preprocess=(Decode(channels=1), to_size),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=3e-3, warmup_steps=chosen.steps // 10),
            weight_decay=1e-4,
        ),
        evaluators={
            name: Classification(
                source=glyphs(name), batch_size=512, every_steps=chosen.steps
            )
            for name in ("validation", "test")
        },
        init=(Init(path=chosen.teacher, into="teachers_0"),) if chosen.teacher else (),
        freeze=("teachers_.*",) if chosen.teacher else (),
        checkpoints=Checkpoints(every_steps=200),
    )
