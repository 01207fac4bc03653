"""What no format of a library expresses is refused by its field, with a way out."""

import pytest

from big_vision_lite.conversion import export
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.families import hybrid as hybrid_formats
from big_vision_lite.conversion.families.vit_huggingface import HuggingFaceViT
from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.bit import BiT, Block, PoolPadding, Stem
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.models.vit_variants import hybrid

TIMM, TORCHVISION = Library.TIMM, Library.TORCHVISION
HUGGINGFACE, NPZ = Library.HUGGINGFACE, Library.NPZ
ALL_BUT_TORCHVISION = (TIMM, HUGGINGFACE, NPZ)
HEAD = Classifier(num_classes=7)
HIDDEN = Classifier(num_classes=7, hidden_dim=4)
EVEN = (64, 64)
TORCH_FORM = dict(standardisation=Standardisation.INSIDE_ROOT, norm_epsilon=1e-5)
BOTH = Pooling.CLASS_TOKEN_AND_AVERAGE
TRAIN_ANOTHER = "head.hidden_dim=none, this model head.hidden_dim=4.*init.drop='head/"


def resnet(**fields):
    return ResNet(**{"stages": (1, 1, 1, 1), "width": 8, "head": HEAD, **fields})


def bit(**fields):
    return BiT(**{"stages": (3,), "width": 32, **fields})


def bit_v1(**fields):
    return BiTV1(trunk=Trunk(stages=(3,), **fields))


def mixer(**fields):
    return MlpMixer.of("S/16", **{"activation": Activation.GELU_ERF, **fields})


def vit(**fields):
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 32, "patch_size": 8}
    token = {"pooling": Pooling.CLASS_TOKEN, "positions": Positions.LEARNED}
    return ViT(**{**sizes, **token, "head": HEAD, **fields})


def exact(**fields):
    return vit(**{"activation": Activation.GELU_ERF, **fields})


def small_hybrid(**fields):
    plain = dict(width=32, depth=2, num_heads=2, mlp_dim=64, head=HEAD)
    form = dict(standardisation=Standardisation.INSIDE_ROOT, trunk_norm_epsilon=1e-5)
    return hybrid("R26+S/32", **{**plain, **form, **fields})


BIG_VISIONS = dict(
    standardisation=Standardisation.OUTSIDE_ROOT, trunk_norm_epsilon=1e-6
)
# What: a model, libraries, words of the refusal.
REFUSED = {
    "ResNet, small stem": (
        resnet(stem=Stem.SMALL),
        (TIMM, TORCHVISION, HUGGINGFACE),
        "stem=large, this model stem=small.*7x7.*no other library has.*safetensors",
    ),
    "ResNet, stem width": (
        resnet(stem_width=32),
        (TIMM, TORCHVISION),
        "stem_width=64, this model stem_width=32.*--to huggingface",
    ),
    "ResNet, two stages": (
        resnet(stages=(1, 1)),
        (TIMM,),
        r"4 stages, this model has stages=\(1, 1\).*--to huggingface",
    ),
    "ResNet, layer before the head": (
        resnet(head=HIDDEN),
        (TIMM, TORCHVISION, HUGGINGFACE),
        TRAIN_ANOTHER,
    ),
    "ResNet, depth of torchvision": (
        resnet(),
        (TORCHVISION,),
        r"stages=\(1, 1, 1, 1\) and width=8.*--to timm",
    ),
    "ResNet, no head": (
        resnet(head=None),
        (TORCHVISION,),
        "head=Classifier, this model head=none.*--to timm",
    ),
    "ResNet, groups": (resnet(groups=2), (HUGGINGFACE,), "groups=2.*--to timm"),
    "ResNet, archives": (resnet(), (NPZ,), "npz has no counterpart of ResNet.*--to"),
    "BiT, small stem": (BiT.of("small"), ALL_BUT_TORCHVISION, "stem=small"),
    "BiT, medium stem": (
        BiT.of("small", stem=Stem.MEDIUM),
        ALL_BUT_TORCHVISION,
        "stem=medium.*no other library has.*safetensors",
    ),
    "BiT, layer before the head": (
        bit(head=HIDDEN),
        ALL_BUT_TORCHVISION,
        TRAIN_ANOTHER,
    ),
    "BiT, negative infinity": (
        bit(pool_padding=PoolPadding.NEGATIVE_INFINITY),
        (TIMM, HUGGINGFACE),
        "pool_padding=negative_infinity.*near the border.*--to npz",
    ),
    "BiT, depth": (
        bit(stages=(2, 2, 2, 2)),
        (TIMM,),
        r"50, 101 and 152 layers.*\(2, 2, 2, 2\).*huggingface",
    ),
    "BiT, groups": (bit(groups=8), (TIMM,), "groups=8.*--to huggingface"),
    "BiT, groups of archives": (bit(groups=8), (NPZ,), "groups=8"),
    "BiT, rounded width": (
        bit(width=36, groups=4),
        (HUGGINGFACE,),
        "multiples of 8, width=36",
    ),
    "BiT, basic": (bit(block=Block.BASIC), (HUGGINGFACE, NPZ), "block=basic.*timm"),
    "BiT, norms after convolutions": (
        bit_v1(**TORCH_FORM),
        (TIMM,),
        "inside hybrid transformers only.*huggingface",
    ),
    "BiT, big_vision's constants": (
        bit_v1(),
        (HUGGINGFACE,),
        "standardisation=outside_root and trunk.norm_epsilon=1e-06.*7e-5.*--to npz",
    ),
    "BiT, torch's constants": (
        bit_v1(**TORCH_FORM),
        (NPZ,),
        "standardisation=inside_root and trunk.norm_epsilon=1e-05.*7e-5",
    ),
    "hybrid, big_vision's constants": (
        hybrid("R26+S/32"),
        (TIMM,),
        "standardisation=outside_root and stem.norm_epsilon=1e-06.*--to npz",
    ),
    "hybrid, torch's constants": (
        small_hybrid(),
        (NPZ,),
        "standardisation=inside_root.*--to timm",
    ),
    "hybrid, trunk": (
        small_hybrid(stem=Trunk(stages=(3,), **TORCH_FORM)),
        (TIMM,),
        r"stages=\(3,\)",
    ),
    "hybrid, pooling": (
        small_hybrid(**BIG_VISIONS, pooling=Pooling.ATTENTION),
        (NPZ,),
        "pooling=attention",
    ),
    "hybrid, other library": (
        small_hybrid(),
        (HUGGINGFACE, TORCHVISION),
        "stem=none.*this model.*stem=Trunk.*--to timm",
    ),
    "mixer, depth": (mixer(depth=5), (TIMM,), "depth=5.*mixer_s16_224"),
    "mixer, tanh": (mixer(activation=Activation.GELU_TANH), (TIMM,), "gelu_tanh.*npz"),
    "mixer, erf": (mixer(), (NPZ,), "activation=gelu_tanh, this model.*--to timm"),
    "mixer, layer before the head": (mixer(head=HIDDEN), (TIMM,), TRAIN_ANOTHER),
    # A plain ViT is refused for its own reason, not as a hybrid.
    "ViT, layer before the head": (
        vit(head=HIDDEN),
        (TIMM, HUGGINGFACE),
        TRAIN_ANOTHER,
    ),
    "ViT, norm constant": (
        vit(norm_epsilon=1e-5),
        (TIMM, TORCHVISION, NPZ),
        "norm_epsilon=1e-05.*--to huggingface",
    ),
    "ViT, SwiGLU in the pooling": (
        vit(activation=Activation.SWIGLU, pooling=Pooling.ATTENTION),
        (TIMM,),
        "no SwiGLU; use",
    ),
    "ViT, distilled with registers": (
        vit(distillation_token=True, registers=1),
        (TIMM,),
        "does not read registers; use registers=0",
    ),
    "ViT, two ways of pooling": (
        vit(layer_scale=0.3, pooling=BOTH, head=None),
        (TIMM, HUGGINGFACE),
        "pooling=class_token_and_average",
    ),
    "ViT, two ways of pooling, archives": (
        vit(pooling=BOTH, head=None),
        (NPZ,),
        "pooling=class_token_and_average",
    ),
    "ViT, register and average": (
        vit(registers=1, pooling=Pooling.AVERAGE),
        (HUGGINGFACE,),
        "(registers=1|pooling=average).*--to timm",
    ),
    "ViT, archives, erf": (exact(), (NPZ,), "activation=gelu_erf.*--to timm"),
    "ViT, archives, no positions": (
        vit(pooling=Pooling.AVERAGE, positions=Positions.NONE),
        (NPZ,),
        "positions=none.*--to safetensors",
    ),
    "ViT, torchvision, tanh": (
        vit(),
        (TORCHVISION,),
        "activation=gelu_tanh.*--to timm",
    ),
    "ViT, torchvision, average": (
        exact(pooling=Pooling.AVERAGE),
        (TORCHVISION,),
        "pooling=average.*--to timm",
    ),
    "ViT, torchvision, no head": (
        exact(head=None),
        (TORCHVISION,),
        "head=Classifier, this model head=none.*--to timm",
    ),
    "ViT, torchvision, registers": (
        exact(registers=2),
        (TORCHVISION,),
        "registers=2.*--to timm",
    ),
    "ViT, HF, attention and head": (
        vit(pooling=Pooling.ATTENTION),
        (HUGGINGFACE,),
        "pooling=attention.*--to timm",
    ),
    "ViT, HF, pooled norm": (
        vit(final_norm=FinalNorm.POOLED),
        (HUGGINGFACE,),
        "final_norm=pooled.*--to timm",
    ),
    "ViT, HF, QK norm": (vit(qk_norm=True), (HUGGINGFACE,), "qk_norm=True.*--to timm"),
    "ViT, HF, registers": (vit(registers=3), (HUGGINGFACE,), "registers=3.*--to timm"),
    "ViT, HF, SwiGLU": (
        vit(activation=Activation.SWIGLU),
        (HUGGINGFACE,),
        "activation=swiglu.*--to timm",
    ),
    "ViT, HF, distilled with scales": (
        vit(distillation_token=True, layer_scale=0.1),
        (HUGGINGFACE,),
        "layer_scale=0.1.*timm",
    ),
    "ViT, HF, tanh layer": (
        vit(head=HIDDEN),
        (HUGGINGFACE,),
        "head.hidden_dim=4.*--to npz",
    ),
    "ViT, HF, width of DINOv2's MLP": (
        vit(layer_scale=1.0, mlp_dim=40),
        (HUGGINGFACE,),
        "mlp_dim=40 at width=16.*--to timm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_cannot_express_is_refused_by_its_field(case):
    model, libraries, words = REFUSED[case]
    for library in libraries:
        with pytest.raises(ValueError, match=words):
            export.find(model, library, EVEN)


@pytest.mark.parametrize(
    "field",
    [
        {"norm_epsilon": 1e-5},
        {"final_norm": FinalNorm.POOLED},
        {"layer_scale": 0.1},
        {"registers": 2},
        {"qk_norm": True},
        {"qkv_bias": False},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_archives_of_vits_cannot_say_is_refused_by_its_field(field):
    (name,) = field
    with pytest.raises(ValueError, match=rf"{name}=.*--to safetensors"):
        export.find(vit(**field), NPZ, EVEN)


@pytest.mark.parametrize(
    ("model", "library"),
    [
        (vit(pooling=Pooling.ATTENTION, head=None), HUGGINGFACE),
        (vit(layer_scale=0.3), HUGGINGFACE),
        (exact(), TORCHVISION),
    ],
    ids=["SigLIP", "DINOv2", "torchvision"],
)
def test_images_that_are_no_squares_do_not_go_where_squares_are_assumed(model, library):
    assert export.find(model, library, (16, 16)).library == library
    with pytest.raises(ValueError, match="square.*16x32 px.*--to timm"):
        export.find(model, library, (16, 32))


def test_images_of_other_channels_do_not_go_to_torchvision():
    with pytest.raises(
        ValueError, match="take 3 channels, this one takes 1.*--to timm"
    ):
        export.find(ResNet.of("R18", head=HEAD), TORCHVISION, EVEN, channels=1)


def test_an_average_does_not_go_to_the_class_that_reads_token_zero():
    model = vit(pooling=Pooling.AVERAGE)
    reason = HuggingFaceViT().refusal(model, (24, 24), 3)
    assert reason is not None and "this model pooling=average" in reason.sentence
    form = export.find(model, HUGGINGFACE, (24, 24))
    assert form.name == "Hugging Face SigLIP"


def test_plain_transformers_are_not_taken_for_hybrids():
    for library in (TIMM, NPZ):
        assert export.find(vit(), library, EVEN) not in hybrid_formats.FORMATS
        trunk = {} if library == TIMM else BIG_VISIONS
        found = export.find(small_hybrid(**trunk), library, EVEN)
        assert found in hybrid_formats.FORMATS


def test_every_library_is_refused_something_and_every_way_out_is_open():
    for model, libraries, _ in REFUSED.values():
        for library in libraries:
            with pytest.raises(ValueError) as error:
                export.find(model, library, EVEN)
            offered = [o for o in Library if f"--to {o}" in str(error.value)]
            assert Library.SAFETENSORS in offered and library not in offered
            for other in offered:
                assert export.find(model, other, EVEN).library == other
    assert {lib for _, libs, _ in REFUSED.values() for lib in libs} == {
        form.library for form in FORMATS
    } - {Library.SAFETENSORS}


def test_two_ways_of_pooling_go_with_one_norm():
    with pytest.raises(ValueError, match="goes with final_norm=tokens"):
        vit(pooling=BOTH, final_norm=FinalNorm.POOLED)
