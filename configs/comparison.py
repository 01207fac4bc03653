"""One small ViT, the same letters, the same CPU time: labels or not?

  python -m big_vision_lite.train --workdir runs/mae \
      --config configs/comparison.py:method=mae,data_dir=DATA_DIR

method    supervised: letters' labels; mae: reconstruction; capi: clusters of hidden
          patches; dino, ibot: self-distillation; ntxent: SimCLR's contrast; vicreg;
          lejepa; siglip: captions, such as "capital A bold", by their letters; distil:
          the probabilities of a trained `teacher`, a run of configs/glyphs.py
transfer  false leaves out what follows the training: few-shot, 10 images a class,
          penalty chosen on images of the pool: handwritten digits, letters of fonts
          never seen, clothes, categories of emoji; and 1,000 clothes fine-tuned.
controls  false leaves out raw pixels and the untrained network beside them

tools/compare.py runs all methods for several seeds and writes the table. Training
images are printed letters in DATA_DIR, 32 px, as in configs/glyphs.py; digits are
scikit-learn's; fashion_mnist and emoji64_free must lie in DATA_DIR, too. The lengths
STEPS are estimates, from short runs, of 240 CPU-seconds on 2 cores without other load.
Settings are those of configs/glyphs_views.py and masked_fashion.py; nothing was chosen
on the test sets.
Published: none. Ours: not yet run.
Hardware: 2 CPU cores, 4 CPU-minutes a training by the estimate.
"""

import string

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import (
    Bytes,
    ColorJitter,
    Decode,
    Describe,
    Keep,
    RandomAffine,
    Resize,
    Tokenize,
)
from big_vision_lite.data.ops.colour import RandomLowResolution
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.ops.views import View, Views
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits, Tfds
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.models.embedder import Embedder, Projector
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.masked_clusters import MaskedClusters
from big_vision_lite.models.text_transformer import TextPooling, TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.clusters import ClusterPrediction
from big_vision_lite.objectives.contrastive import NTXent
from big_vision_lite.objectives.distillation import LogitDistillation
from big_vision_lite.objectives.image_text import SigLIP
from big_vision_lite.objectives.masked_patches import MaskedPatches
from big_vision_lite.objectives.reconstruction import MaskedReconstruction
from big_vision_lite.objectives.regularised import LeJEPA, VICReg
from big_vision_lite.objectives.self_distillation import SelfDistillation
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.adamw_rule import AdamWRule
from big_vision_lite.runs.hyperrule import read_run
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator, Model, Objective

CLASSES = 62
STEPS = {
    **{"supervised": 1500, "mae": 1200, "capi": 800, "dino": 300, "ibot": 220},
    **{"ntxent": 720, "vicreg": 720, "lejepa": 720, "siglip": 1300, "distil": 1100},
}
VIEWS = ("dino", "ibot", "ntxent", "vicreg", "lejepa")
# A caption is made of the label and the name of the font's file.
LABELLED = ("supervised", "siglip")
AVERAGED = ("dino", "ibot", "capi")
LENGTH = 32
NAMES = (
    *(f"digit {digit}" for digit in string.digits),
    *(f"capital {letter}" for letter in string.ascii_uppercase),
    *(f"small {letter}" for letter in string.ascii_lowercase),
)
STYLES = ("bold", "italic", "oblique=>italic")
TO_SIZE = Resize(size_px=32, resampling=Resampling.PIL_BILINEAR)
PREPROCESS = (Decode(channels=1), TO_SIZE)


def backbone(**fields) -> ViT:
    """Returns the network of all methods, 0.45 M parameters."""
    size = dict(width=96, depth=4, mlp_dim=384, num_heads=3, patch_size=4)
    return ViT(**size, **fields)


def model_and_objective(method: str, teacher: str) -> tuple[Model, Objective]:
    """Returns what differs between the methods."""
    views = {
        "ntxent": (NTXent(temperature=0.2), (256,), 64),
        "vicreg": (VICReg(), (256, 256), 256),
        "lejepa": (LeJEPA(weight=0.05), (256,), 16),
    }
    if method in views:
        objective, hidden, features = views[method]
        projector = Projector(hidden=hidden, features=features)
        return Embedder(encoder=backbone(), projector=projector), objective
    if method in ("dino", "ibot"):
        patches = method == "ibot"
        model = Embedder(
            encoder=backbone(mask_token=patches),
            projector=Projector(hidden=(256, 256), features=64),
            prototypes=64,
            patch_projector=Projector(hidden=(256,), features=64) if patches else None,
            patch_prototypes=64 if patches else 0,
        )
        masked = MaskedPatches(progress_end=0.3) if patches else None
        return model, SelfDistillation(teacher_temperature=0.025, patches=masked)
    if method == "siglip":
        text_tower = TextTransformer(
            vocabulary=257,
            width=64,
            depth=2,
            mlp_dim=256,
            num_heads=4,
            length=LENGTH,
            pooling=TextPooling.AVERAGE,
        )
        towers = dict(image_tower=backbone(), text_tower=text_tower, features=64)
        start = dict(temperature=20.0, temperature_max=100.0, bias=-5.0)
        return TwoTower(**towers, **start), SigLIP(equal_captions=True)
    decoder = dict(decoder_width=48, decoder_depth=1, decoder_heads=3)
    if method == "mae":
        # Blocks of 8 px: of a patch of 4 px the neighbours tell the content.
        model = MaskedAutoencoder(encoder=backbone(), mask_block=2, **decoder)
        return model, MaskedReconstruction()
    if method == "capi":
        model = MaskedClusters(encoder=backbone(), clusters=64, **decoder)
        return model, ClusterPrediction()
    student = backbone(head=Classifier(num_classes=CLASSES))
    if method == "distil":
        teachers = (read_run(teacher).model,)
        return Distilled(student=student, teachers=teachers), LogitDistillation()
    return student, SoftmaxClassification()


def transfer_to(
    data_dir: str | None, step: int, controls: bool
) -> dict[str, Evaluator]:
    """Returns the evaluators of the network at `step`, the last."""

    def tfds(dataset: str, split: str, label_key: str = "label") -> Tfds:
        return Tfds(
            dataset=dataset, split=split, data_dir=data_dir, label_key=label_key
        )

    def few(name: str, dataset: str, *splits: str, label_key: str = "label"):
        train, test = (tfds(dataset, split, label_key) for split in splits)
        return FewShotSet(name=name, train=train, test=test)

    digits = FewShotSet(
        name="digits",
        train=Digits(split="train"),
        test=Digits(split="test"),
        preprocess=(Decode(channels=1), Resize(size_px=32)),
    )
    fonts = few("new_fonts", "glyphs32_latin", "train[:6000]", "test[:4000]")
    clothes = few("fashion", "fashion_mnist", "train[:6000]", "test[:4000]")
    emoji = few(
        "emoji", "emoji64_free", "google_train", "google_test", label_key="category"
    )
    return {
        "fewshot": FewShot(
            sets=(digits, fonts, clothes, emoji),
            shots=(10,),
            every_steps=step,
            batch_size=512,
            controls=controls,
        ),
        "finetune": FineTune(
            train=tfds("fashion_mnist", "train[:1000]"),
            test=tfds("fashion_mnist", "test"),
            rule=AdamWRule(num_steps=240, ops=(*PREPROCESS, RandomAffine(degrees=5.0))),
            every_steps=step,
            eval_batch_size=512,
            controls=controls,
        ),
    }


def get_config(arg: str = "") -> TrainConfig:
    """Returns the training of one `method`, with the evaluators if `transfer`."""
    chosen = parse_arg(
        arg,
        method="supervised",
        data_dir="",
        teacher="",
        steps=0,
        transfer=True,
        controls=True,
    )
    method = chosen.method
    if method not in STEPS:
        raise ValueError(f"method={method} is unknown; use one of {', '.join(STEPS)}.")
    if method == "distil" and not chosen.teacher:
        raise ValueError("method=distil learns from a run: add teacher=runs/glyphs.")
    num_steps = chosen.steps or STEPS[method]
    data_dir = chosen.data_dir or None
    model, objective = model_and_objective(method, chosen.teacher)
    distort = (
        RandomAffine(
            degrees=15.0,
            translate=0.1,
            scale_min=0.75,
            scale_max=1.35,
            shear_degrees=15.0,
        ),
        RandomLowResolution(side_min_px=8),
        ColorJitter(brightness=0.4, offset=20.0),
    )
    if method == "siglip":
        distort += (
            Describe(names=NAMES, text="font", words=STYLES),
            Tokenize(tokenizer=Bytes(offset=1), length=LENGTH),
            Keep(keys=("image", "text")),
        )
    if method in VIEWS:
        distort = (Views(views=(View(name="views", ops=distort, count=2),)),)
    distil, evaluators = method == "distil", {}
    if chosen.transfer:
        evaluators = transfer_to(data_dir, num_steps, chosen.controls)
    return TrainConfig(
        num_steps=num_steps,
        model=model,
        objective=objective,
        data=Stream(
            source=Tfds(
                dataset="glyphs32_latin",
                split="train",
                data_dir=data_dir,
                label_key="label" if method in LABELLED else None,
                keys=("font",) if method == "siglip" else (),
            ),
            ops=(*PREPROCESS, *distort),
            batch_size=128,
        ),
        preprocess=PREPROCESS,
        optimizer=AdamW(
            schedule=WarmupCosine(peak=2e-3, warmup_steps=num_steps // 10),
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        evaluators=evaluators,
        ema=Average(start=0.97) if method in AVERAGED else None,
        init=(Init(path=chosen.teacher, into="teachers_0"),) if distil else (),
        freeze=("teachers_.*",) if distil else (),
        checkpoints=Checkpoints(every_steps=200),
        log_every_steps=20,
    )
