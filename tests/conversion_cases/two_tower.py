"""Both towers of SigLIP in Hugging Face's transformers."""

from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.text_transformer import TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from conversion_cases.case import NO_HEAD, Case, Ours, slow
from conversion_cases.vit_archives import PROBE
from conversion_cases.vit_huggingface import HF_SEVEN, TINY_HF, huggingface

FORM = "Hugging Face SigLIP, both towers"
# Narrower than the image tower, and projected to its width.
TEXT = {
    **{n: x for n, x in TINY_HF.items() if n not in ("image_size", "patch_size")},
    **dict(hidden_size=8, intermediate_size=24, num_hidden_layers=2),
    **dict(vocab_size=11, max_position_embeddings=5, projection_size=16),
}


def both(text: Any = None, **more: Any) -> Case:
    given = {"vision_config": {**TINY_HF, **more}, "text_config": {**TEXT, **text}}
    name = FORM.removeprefix("Hugging Face ")
    return huggingface(name, "SiglipModel", "SiglipConfig", given)


SMALL = TextTransformer(
    vocabulary=11, width=8, depth=2, mlp_dim=24, num_heads=2, length=5
)


def towers(**fields: Any) -> TwoTower:
    image = PROBE.clone(**NO_HEAD)
    given = dict(text_tower=SMALL, features=image.width, project_image=False)
    return TwoTower(image_tower=image, **{**given, **fields})


CASES = {
    "HF SigLIP, both": both({}),
    "HF SigLIP, both, odd, exact": slow(both({"hidden_act": "gelu"}, **HF_SEVEN)),
    "HF SigLIP, both, ours": Case(
        form="Hugging Face SigLIP, both towers", ours=towers()
    ),
}
OURS = {
    "HF SigLIP, both": Ours(library=Library.HUGGINGFACE, model=towers(), size=(16, 16)),
    "HF SigLIP, both, exact": slow(
        Ours(
            library=Library.HUGGINGFACE,
            model=towers(text_tower=SMALL.clone(activation=Activation.GELU_ERF)),
            size=(24, 24),
        )
    ),
}
