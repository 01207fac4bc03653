"""Printed letters to handwritten digits: a small pretraining whose transfer shows.

  python -m big_vision_lite.train --config configs/glyphs.py:data_dir=DATA_DIR \
      --workdir runs/glyphs
  ... --config configs/glyphs.py:data_dir=DATA_DIR,model=vit --workdir runs/glyphs_vit
  ... --config configs/glyphs.py:data_dir=DATA_DIR,fashion=true

`model=vit_token` is a ViT that timm and Hugging Face have, too (class token, no hidden
layer in the head): tools/convert_checkpoint.py takes it there. `fashion=true` adds what
the glyphs are worth on other images: 1,000 of fashion_mnist, fine-tuned on from them
and from scratch, three seeds each; that set must lie in DATA_DIR as well.

DATA_DIR holds a prepared set of 32x32 gray glyphs, light on dark, with the splits
train, validation and test, no family of fonts in two of them; `dataset` names it.
Make it from the fonts you have:

  python tools/prepare_dataset.py glyphs --fonts /usr/share/fonts --out DATA_DIR

Few-shot: scikit-learn's 8x8 handwritten digits, resized to 32x32 bilinearly. Beside
every score stand raw pixels and the untrained network; a transfer score without them
proves nothing. Published: none. Ours (three seeds): fonts never seen 82.9 +- 0.2 %
and 10-shot digits 93.7 +- 0.2 % by the ResNet, 73.5 +- 2.1 and 86.2 +- 2.4 % by the
ViT, raw pixels 83.0 %; on 1,674 fonts from font packages, fonts that look alike in one
split. Other fonts give other numbers.
Hardware: 2 CPU cores, 3 minutes (ResNet) or 15 CPU-minutes (ViT).
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, RandomAffine, Resize
from big_vision_lite.data.ops.colour import RandomLowResolution
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits, Tfds
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.models.bit import BiT, Stem
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import HyperRule
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `model` is resnet (0.4 M parameters), vit or vit_token."""
    chosen = parse_arg(
        arg,
        model="resnet",
        data_dir="",
        dataset="glyphs32_latin",
        classes=62,
        fashion=False,
    )

    def head(hidden_dim: int | None) -> Classifier:
        # The few-shot penalty of 1024 suits wide representations; of a hundred features
        # it would leave little more than the mean of every class.
        return Classifier(num_classes=chosen.classes, hidden_dim=hidden_dim)

    def vit(hidden_dim: int | None, pooling: Pooling) -> ViT:
        return ViT(
            width=96,
            depth=4,
            mlp_dim=384,
            num_heads=3,
            patch_size=4,
            pooling=pooling,
            head=head(hidden_dim),
        )

    models = {
        "resnet": lambda: BiT.of("small", width=24, stem=Stem.MEDIUM, head=head(1280)),
        "vit": lambda: vit(256, Pooling.AVERAGE),
        "vit_token": lambda: vit(None, Pooling.CLASS_TOKEN),
    }
    if chosen.model not in models:
        raise ValueError(
            f"model={chosen.model} is unknown; use one of {', '.join(models)}."
        )
    num_steps = 1000 if chosen.model == "resnet" else 1500

    def glyphs(split: str) -> Tfds:
        return Tfds(
            dataset=chosen.dataset, split=split, data_dir=chosen.data_dir or None
        )

    def fashion(split: str) -> Tfds:
        return Tfds(
            dataset="fashion_mnist", split=split, data_dir=chosen.data_dir or None
        )

    # As timm and Hugging Face do it, pixel by pixel.
    to_size = Resize(size_px=32, resampling=Resampling.PIL_BILINEAR)
    digits = FewShotSet(
        name="digits",
        train=Digits(split="train"),
        test=Digits(split="test"),
        preprocess=(Decode(channels=1), Resize(size_px=32)),
    )
    evaluators: dict[str, Evaluator] = {
        "validation": Classification(
            source=glyphs("validation"), batch_size=512, every_steps=500
        ),
        "test": Classification(
            source=glyphs("test"), batch_size=512, every_steps=num_steps
        ),
        "fewshot": FewShot(sets=(digits,), every_steps=num_steps),
    }
    if chosen.fashion:
        evaluators["fashion"] = FineTune(
            train=fashion("train[:1000]"),
            test=fashion("test"),
            # For the glyphs' 32 px and a small machine, see hyperrule.py.
            rule=HyperRule(size_px=32, peak=0.001, batch_size=128),
            seeds=(0, 1, 2),
            every_steps=num_steps,
            eval_batch_size=500,
        )
    return TrainConfig(
        num_steps=num_steps,
        model=models[chosen.model](),
        objective=SoftmaxClassification(),
        data=Stream(
            source=glyphs("train"),
            ops=(
                Decode(channels=1),
                to_size,
                # Handwriting leans, varies in size, and was scanned at 8 px.
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
        # The set is of this size; images that are predicted may be of any.
        preprocess=(Decode(channels=1), to_size),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=3e-3, warmup_steps=100), weight_decay=1e-4
        ),
        evaluators=evaluators,
        checkpoints=Checkpoints(every_steps=250),
    )
