"""ViT-B/16 that learns by writing captions: CapPa (arXiv:2306.07915).

  python -m big_vision_lite.train \
      --config configs/cappa.py:data_dir=DATA_DIR,tokenizer=FILE --workdir runs/cappa
  ... --config configs/cappa.py:data_dir=DATA_DIR,tokenizer=FILE,parallel=0

`dataset` names a set of DATA_DIR as TensorFlow Datasets prepares it and `captions` its
feature of text, of which one is drawn. COCO's 83,000 images only show that it runs; the
published models saw a billion pairs of WebLI, three times. FILE is a SentencePiece
model of `vocabulary` ids whose id 0 pads and id 1 ends texts, as T5's; without it a
text is its first 63 bytes, which is for trying things only. Three quarters of the
captions are predicted in parallel, `parallel=0` writes all one id after the other
(Cap). `probe=true` watches imagenet2012 of DATA_DIR.

Decoder of 6 blocks without biases, Adafactor with learning rate 1e-3, decay 1e-4, clip
1, 10,000 steps of warm-up, batch 8,192, 366,500 steps, images resized without
augmentation: the recipe that the paper's authors published.
Published: the paper's tables; ours: not yet run.
Hardware: a TPU slice; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import (
    Bytes,
    Decode,
    Keep,
    Resize,
    SentencePiece,
    Tokenize,
)
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.ops.text import Empty
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.evaluators.online_probe import OnlineProbe
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.captioner import Captioner
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.captioning import Captioning
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import Adafactor
from big_vision_lite.types import Evaluator

LENGTH = 64


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `size` names a ViT, `parallel` a share of the captions."""
    chosen = parse_arg(
        arg,
        size="B/16",
        image_px=224,
        data_dir="",
        dataset="coco_captions",
        split="train",
        val_split="val",
        captions="captions/text",
        tokenizer="",
        vocabulary=32_000,
        parallel=0.75,
        probe=False,
    )
    data_dir = chosen.data_dir or None

    def pairs(split: str) -> Tfds:
        return Tfds(
            dataset=chosen.dataset,
            split=split,
            data_dir=data_dir,
            label_key=None,
            keys=(f"{chosen.captions}=>caption",),
        )

    def imagenet(split: str) -> Tfds:
        return Tfds(dataset="imagenet2012", split=split, data_dir=data_dir)

    to_size = Resize(size_px=chosen.image_px, resampling=Resampling.PIL_BILINEAR)
    tokenize = Tokenize(
        tokenizer=SentencePiece(path=chosen.tokenizer)
        if chosen.tokenizer
        else Bytes(offset=2),
        length=LENGTH,
        end=1,
        empty=Empty.SKIP,
    )
    ops = (Decode(), to_size, tokenize, Keep(keys=("image", "text")))
    evaluators: dict[str, Evaluator] = {
        "loss": Loss(
            source=pairs(chosen.val_split), ops=ops, batch_size=1024, every_steps=5000
        )
    }
    if chosen.probe:
        evaluators["probe"] = OnlineProbe(
            train=imagenet("train[:20000]"),
            test=imagenet("validation[:5000]"),
            batch_size=1024,
            every_steps=5000,
        )
    return TrainConfig(
        num_steps=366_500,
        model=Captioner(
            encoder=ViT.of(
                chosen.size, positions=Positions.LEARNED, dtype=Dtype.BFLOAT16
            ),
            vocabulary=chosen.vocabulary if chosen.tokenizer else 258,
            length=LENGTH,
            parallel_prediction=chosen.parallel,
        ),
        objective=Captioning(),
        data=Stream(source=pairs(chosen.split), ops=ops, batch_size=8192),
        preprocess=(Decode(), to_size),
        optimizer=Adafactor(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=10_000), weight_decay=1e-4
        ),
        evaluators=evaluators,
        checkpoints=Checkpoints(every_steps=1000),
    )
