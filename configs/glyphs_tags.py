"""Printed letters by their tags: a few words an image, noisy, synonymous, uneven.

  python -m big_vision_lite.train --config configs/glyphs_tags.py:data_dir=DATA_DIR \
      --workdir runs/glyphs_tags
  ... :data_dir=DATA_DIR,dataset=glyphs32_noisy_tags,classes=49,resample=square_root
  ... :data_dir=DATA_DIR,objective=sigmoid,noise=0.25

dataset     a set with tags in DATA_DIR, `classes` the number of them
vocabulary  which words count, without it DATA_DIR/`dataset`.json
objective   softmax: each of an image's k tags has the target 1 / k; sigmoid: each tag
            by itself
resample    natural: every image once; square_root, uniform: rare tags more often
noise       the share of the tags that chance replaces

Tags are the character, its kind (capital, small, digit) and the styles that the font's
file is named by. Make both from glyphs32_latin (see configs/glyphs.py) with a text
"font"; the noisy set by `--zipf 1 --synonyms 3 --missing 0.2 --chatter 0.5` besides:

  python tools/noisy_tags.py glyphs32_latin --data_dir DATA_DIR --out DATA_DIR \
      --name glyphs32_tags --text font
  python tools/prepare_dataset.py tags --tfds glyphs32_tags --data_dir DATA_DIR \
      --synonyms DATA_DIR/glyphs32_tags/1.0.0/synonyms.csv --only_listed \
      --min_count 20 --out DATA_DIR/glyphs32_tags.json

Scored by few-shot on frozen features, as in configs/glyphs_views.py: handwritten digits
and letters of fonts that training never saw, beside raw pixels and the untrained
network. Published: none. Ours (three seeds): digits 90.6 +- 0.8 %, new fonts 75.4 +-
0.5 %, raw pixels 83.6 and 44.6 %; of the noisy set with 600 steps natural 85.1 and
69.0 %, square_root 85.7 and 70.0 %, its sigmoid 84.8 and 65.8 %, with a quarter of
noise 84.5 and 66.8 %: tools/benchmarks.md. Settings are those of configs/glyphs.py.
Hardware: 2 CPU cores, 2 CPU-minutes.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, RandomAffine, Resize
from big_vision_lite.data.ops.colour import RandomLowResolution
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits, Frequency, Resampled, Tags, Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.models.bit import BiT, Stem
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW

OBJECTIVES = {
    "softmax": SoftmaxClassification(share_labels=True),
    "sigmoid": SigmoidClassification(),
}


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `objective` is softmax or sigmoid."""
    chosen = parse_arg(
        arg,
        data_dir="",
        dataset="glyphs32_tags",
        classes=51,
        vocabulary="",
        letters="glyphs32_latin",
        objective="softmax",
        resample=Frequency.NATURAL,
        noise=0.0,
        steps=1000,
    )
    if chosen.objective not in OBJECTIVES:
        raise ValueError(
            f"objective={chosen.objective} is unknown; use one of "
            f"{', '.join(OBJECTIVES)}."
        )
    beside = f"{chosen.data_dir or '.'}/{chosen.dataset}.json"

    def tagged(split: str, noise: float = 0.0) -> Tags:
        words = Tfds(
            dataset=chosen.dataset,
            split=split,
            data_dir=chosen.data_dir or None,
            label_key=None,
            keys=("tags",),
        )
        vocabulary = chosen.vocabulary or beside
        return Tags(source=words, vocabulary=vocabulary, max_tags=8, noise=noise)

    def letters(split: str) -> Tfds:
        return Tfds(
            dataset=chosen.letters, split=split, data_dir=chosen.data_dir or None
        )

    to_size = Resize(size_px=32, resampling=Resampling.PIL_BILINEAR)
    digits = FewShotSet(
        name="digits",
        train=Digits(split="train"),
        test=Digits(split="test"),
        preprocess=(Decode(channels=1), Resize(size_px=32)),
    )
    fonts = FewShotSet(
        name="new_fonts", train=letters("train[:6000]"), test=letters("test[:4000]")
    )
    return TrainConfig(
        num_steps=chosen.steps,
        model=BiT.of(
            "small",
            width=24,
            stem=Stem.MEDIUM,
            head=Classifier(num_classes=chosen.classes),
        ),
        objective=OBJECTIVES[chosen.objective],
        data=Stream(
            source=Resampled(
                source=tagged("train", chosen.noise), frequency=chosen.resample
            ),
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
            "validation": Classification(
                source=tagged("validation"), batch_size=512, every_steps=chosen.steps
            ),
            "fewshot": FewShot(
                sets=(digits, fonts),
                shots=(10,),
                every_steps=chosen.steps,
                batch_size=512,
            ),
        },
        checkpoints=Checkpoints(every_steps=250),
        log_every_steps=20,
    )
