"""ViTs in the archives of big_vision and vision_transformer, and in our own names."""

from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from conversion_cases.case import HEAD, TOKEN, Case

TINY = ViT(
    **dict(width=32, depth=1, mlp_dim=32, num_heads=2, patch_size=8, head=HEAD),
    **TOKEN,
)
PROBE = TINY.clone(pooling=Pooling.ATTENTION)
MODELS = {
    "big_vision ViT (npz)": TINY,
    "big_vision ViT (npz, stacked blocks)": PROBE,
    "big_vision image-text ViT (npz)": PROBE,
    "big_vision image-text ViT (npz, stacked blocks)": PROBE,
    "vision_transformer ViT (npz)": TINY,
}
CASES = {
    "big_vision_lite": Case(form="big_vision_lite", ours=TINY),
    **{form: Case(form=form, ours=ours, config={}) for form, ours in MODELS.items()},
}
