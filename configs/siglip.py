"""ViT-B/16 and a text transformer of its size by SigLIP's loss (arXiv:2303.15343).

  python -m big_vision_lite.train \
      --config configs/siglip.py:data_dir=DATA_DIR,tokenizer=FILE --workdir runs/siglip
  ... --config configs/siglip.py:data_dir=DATA_DIR,tokenizer=FILE,locked=WEIGHTS
  ... --config configs/siglip.py:data_dir=DATA_DIR,tokenizer=FILE,prompts=prompts.json

`dataset` names a set of DATA_DIR as TensorFlow Datasets prepares it and `captions` its
feature of text: one or several an image, of which one is drawn. COCO's 83,000 images
only show that it runs; the published models saw WebLI. FILE is a SentencePiece model of
`vocabulary` ids whose id 1 ends and pads texts, as T5's and SigLIP's do; without it a
text is its first 63 bytes, which is for trying things only. `prompts` adds the
zero-shot accuracy on imagenet2012 of DATA_DIR (see evaluators/zero_shot.py for the
file). `locked` keeps an image tower as it is, of a run or of another library (LiT,
arXiv:2111.07991): only text is learnt, images are projected.

Batch 32,768, learning rate 1e-3, decay 1e-4 and 20,000 steps of warm-up, 40 billion
pairs, 64 tokens: arXiv:2502.14786; temperature 10, bias -10 and beta2 0.95:
arXiv:2303.15343.
Published: 78.2 % zero-shot on ImageNet and 52.1 / 68.9 % recall@1 on COCO for SigLIP 2
of this size, which adds captioning and self-distillation. Ours: not yet run.
Hardware: a TPU slice; hours not yet measured.
"""

from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import (
    Bytes,
    Decode,
    Keep,
    Resize,
    SentencePiece,
    Tokenize,
)
from big_vision_lite.data.ops.resampling import Resampling
from big_vision_lite.data.ops.text import Empty, Spelling
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators.retrieval import Retrieval
from big_vision_lite.evaluators.zero_shot import ZeroShot
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.text_transformer import TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import SIZES, ViT
from big_vision_lite.objectives.image_text import SigLIP
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs.hyperrule import read_run
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator

BATCH_SIZE = 32_768
STEPS = round(40e9 / BATCH_SIZE)
LENGTH = 64


def get_config(arg: str = "") -> TrainConfig:
    """Returns the recipe; `size` names a ViT, `locked` weights for its place."""
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
        prompts="",
        locked="",
    )

    def pairs(split: str) -> Tfds:
        return Tfds(
            dataset=chosen.dataset,
            split=split,
            data_dir=chosen.data_dir or None,
            label_key=None,
            keys=(f"{chosen.captions}=>caption",),
        )

    width, depth, mlp_dim, num_heads = SIZES[chosen.size.partition("/")[0]]
    text_tower = TextTransformer(
        vocabulary=chosen.vocabulary if chosen.tokenizer else 258,
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        length=LENGTH,
        dtype=Dtype.BFLOAT16,
    )
    image_tower = ViT.of(
        chosen.size,
        pooling=Pooling.ATTENTION,
        positions=Positions.LEARNED,
        dtype=Dtype.BFLOAT16,
    )
    if chosen.locked:
        image_tower = read_run(chosen.locked).model
    tokenize = Tokenize(
        tokenizer=SentencePiece(path=chosen.tokenizer)
        if chosen.tokenizer
        else Bytes(offset=2),
        length=LENGTH,
        end=1,
        padding=1,
        spelling=Spelling.CANONICAL,
        empty=Empty.SKIP,
    )
    to_size = Resize(size_px=chosen.image_px, resampling=Resampling.PIL_BILINEAR)
    evaluators: dict[str, Evaluator] = {
        "retrieval": Retrieval(
            source=pairs(chosen.val_split),
            tokenize=tokenize,
            captions=5,
            batch_size=1024,
            every_steps=5000,
        )
    }
    if chosen.prompts:
        evaluators["imagenet"] = ZeroShot(
            source=Tfds(
                dataset="imagenet2012",
                split="validation",
                data_dir=chosen.data_dir or None,
            ),
            tokenize=tokenize,
            file=chosen.prompts,
            batch_size=1024,
            every_steps=5000,
        )
    return TrainConfig(
        num_steps=STEPS,
        model=TwoTower(
            image_tower=image_tower,
            text_tower=text_tower,
            features=width,
            project_image=bool(chosen.locked),
        ),
        objective=SigLIP(),
        data=Stream(
            source=pairs(chosen.split),
            ops=(Decode(), to_size, tokenize, Keep(keys=("image", "text"))),
            batch_size=BATCH_SIZE,
        ),
        preprocess=(Decode(), to_size),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=20_000),
            beta2=0.95,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        evaluators=evaluators,
        init=(Init(path=chosen.locked),) if chosen.locked else (),
        freeze=("image_tower/.*",) if chosen.locked else (),
        checkpoints=Checkpoints(every_steps=1000),
    )
