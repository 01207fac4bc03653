"""What tools/show_model.py counts, against timm: parameters, FLOPs, activations."""

import json

import model_spec
import pytest
import shapes_run
import show_model
import torch_libraries

from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.models.two_tower import TwoTower

pytestmark = pytest.mark.parity
SLOW = (pytest.mark.slow, pytest.mark.tools)

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")

TOKEN = ",pooling=class_token,positions=learned"
# Ours: timm's name, and what timm publishes for 224 px (results/benchmark-infer-amp-
# nchw-pt240-cu124-rtx3090.csv): million parameters, GMACs, million activations. Its
# ViT-L/32 and H/14 have no head and are left out.
PUBLISHED = {
    f"ViT:Ti/16{TOKEN}": ("vit_tiny_patch16_224", 5.72, 1.26, 5.97),
    f"ViT:S/32{TOKEN}": ("vit_small_patch32_224", 22.88, 1.15, 2.5),
    f"ViT:S/16{TOKEN}": ("vit_small_patch16_224", 22.05, 4.61, 11.95),
    f"ViT:B/32{TOKEN}": ("vit_base_patch32_224", 88.22, 4.41, 5.01),
    f"ViT:B/16{TOKEN}": ("vit_base_patch16_224", 86.57, 17.58, 23.9),
    f"ViT:L/16{TOKEN}": ("vit_large_patch16_224", 304.33, 61.6, 63.52),
    "MlpMixer:S/32": ("mixer_s32_224", 19.1, 1.0, 2.28),
    "MlpMixer:S/16": ("mixer_s16_224", 18.53, 3.79, 5.97),
    "MlpMixer:B/32": ("mixer_b32_224", 60.29, 3.24, 6.29),
    "MlpMixer:B/16": ("mixer_b16_224", 59.88, 12.62, 14.53),
    "MlpMixer:L/32": ("mixer_l32_224", 206.94, 11.27, 19.86),
    "MlpMixer:L/16": ("mixer_l16_224", 208.2, 44.6, 41.69),
    "ResNet:R18": ("resnet18", 11.69, 1.82, 2.48),
    "ResNet:R34": ("resnet34", 21.8, 3.67, 3.74),
    "ResNet:R50": ("resnet50", 25.56, 4.11, 11.11),
    "ResNet:R101": ("resnet101", 44.55, 7.83, 16.23),
    "ResNet:R152": ("resnet152", 60.19, 11.56, 22.56),
    "ResNet:X50_32x4d": ("resnext50_32x4d", 25.03, 4.26, 14.4),
    "ResNet:X101_32x8d": ("resnext101_32x8d", 88.79, 16.48, 31.21),
    "ResNet:X101_64x4d": ("resnext101_64x4d", 83.46, 15.52, 31.21),
    "ResNet:X101_32x16d": ("resnext101_32x16d", 194.03, 36.27, 51.18),
    "ResNet:X101_32x32d": ("resnext101_32x32d", 468.53, 87.29, 91.12),
    "ResNet:W50_2": ("wide_resnet50_2", 68.88, 11.43, 14.4),
    "ResNet:W101_2": ("wide_resnet101_2", 126.89, 22.8, 21.23),
    "BiT:R50x1": ("resnetv2_50x1_bit", 25.55, 4.23, 11.11),
    "BiT:R101x1": ("resnetv2_101x1_bit", 44.54, 8.04, 16.23),
    "BiT:R50x3": ("resnetv2_50x3_bit", 217.32, 37.06, 33.34),
    "BiT:R101x3": ("resnetv2_101x3_bit", 387.93, 71.23, 48.7),
    "BiT:R152x2": ("resnetv2_152x2_bit", 236.34, 46.95, 45.11),
    "BiT:R152x4": ("resnetv2_152x4_bit", 936.53, 186.9, 90.22),
}
FEW = (
    f"ViT:S/16{TOKEN}",
    "MlpMixer:S/32",
    "ResNet:R18",
    "ResNet:R50",
    "ResNet:X50_32x4d",
    "BiT:R50x1",
)
CASES = [pytest.param(spec, marks=() if spec in FEW else SLOW) for spec in PUBLISHED]


def whole(spec):
    model = model_spec.build(spec, num_classes=1000)
    return show_model.describe(model, (224, 224), depth=0).whole


def their_model(spec):
    arguments = {"no_embed_class": True} if spec.startswith("ViT") else {}
    with torch.device("meta"):
        model = timm.create_model(PUBLISHED[spec][0], num_classes=1000, **arguments)
    return model.eval()


def hooked(model):
    """Returns what timm's layers do on one image: products, outputs, weights, norms."""
    found = {"products": 0, "outputs": 0, "weights": 0, "normed": 0}

    def count(module, _, output):
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            found["products"] += output.numel() * module.weight[0].numel()
            found["outputs"] += output.numel()
            if isinstance(module, torch.nn.Conv2d):
                found["weights"] += module.weight.numel()
        else:
            found["normed"] += output.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros((1, 3, 224, 224), device="meta"))
    return found


@pytest.mark.parametrize("spec", CASES)
def test_parameters_flops_and_activations_are_those_that_timm_publishes(spec):
    found, model = whole(spec), their_model(spec)
    name, parameters, gmacs, activations = PUBLISHED[spec]
    # Equal to the last one: timm's class token has no position of its own here.
    assert found.parameters == sum(p.numel() for p in model.parameters()), name
    assert found.parameters / 1e6 == pytest.approx(parameters, abs=0.0051)
    assert found.activations / 1e6 == pytest.approx(activations, rel=0.01)
    # timm counts norms, too: 2 for a value of batch norm, 5 of layer and group norm.
    # BiT standardises its weights by a batch norm over them, 4 for a weight.
    extra = 0
    if spec.startswith("BiT"):
        layers = hooked(model)
        extra = 4 * layers["weights"] + 5 * layers["normed"]
    # Published with two decimals.
    products = (found.flops / 2 + extra) / 1e9
    assert products == pytest.approx(gmacs, rel=0.01, abs=0.0051)


@pytest.mark.parametrize("spec", ["ResNet:R50", "BiT:R50x1", "MlpMixer:S/32"])
def test_products_and_outputs_are_exactly_those_of_timms_layers(spec):
    found, layers = whole(spec), hooked(their_model(spec))
    assert found.flops == 2 * layers["products"]
    assert found.activations == layers["outputs"]


@pytest.mark.parametrize("spec", ["ViT:Ti/16,depth=2", "ResNet:R18", "BiTV1:R50x1"])
def test_parts_add_up_to_the_whole(spec):
    model = model_spec.build(spec, num_classes=10)
    shown = show_model.describe(model, (64, 96), depth=1)
    rest = shown.parts[1:]
    assert sum(part.flops for part in rest) == shown.whole.flops
    assert sum(part.activations for part in rest) == shown.whole.activations
    # The class token and the like belong to the model itself.
    assert sum(part.parameters for part in rest) <= shown.whole.parameters
    deep = show_model.describe(model, (64, 96), depth=9)
    assert deep.whole == shown.whole
    leaves = [
        part
        for part in deep.parts[1:]
        if not any(other.name.startswith(f"{part.name}/") for other in deep.parts)
    ]
    assert sum(part.parameters for part in leaves) <= deep.whole.parameters
    assert all(part.parameters or part.flops or part.output for part in leaves)


def test_a_layer_has_the_numbers_of_a_sum_by_hand():
    model = model_spec.build("ViT:Ti/16,depth=2", num_classes=10)
    shown = show_model.describe(model, (64, 96), depth=9)
    parts = {part.name: part for part in shown.parts}
    tokens, width, hidden = 4 * 6, 192, 768
    mlp = parts["encoder/block_01/mlp/hidden"]
    assert mlp.parameters == width * hidden + hidden
    assert mlp.flops == 2 * tokens * width * hidden
    assert mlp.activations == tokens * hidden
    assert mlp.output == "float32[1, 24, 768]"
    # In no module of their own: q, k and v, two products of these, and one back.
    assert parts["encoder/block_01/attention"].flops == (
        2 * tokens * width * 4 * width + 2 * 2 * tokens**2 * width
    )
    assert shown.outputs["logits"] == "float32[1, 10]"
    names = [part.name for part in shown.parts]
    assert names.index("patch_embedding") < names.index("encoder")
    assert names[-1] == "head"


def test_batch_statistics_are_no_parameters():
    model = model_spec.build("ResNet:R18", num_classes=None)
    shown = show_model.describe(model, (32, 32))
    channels = 64 + sum(4 * c + (c if c > 64 else 0) for c in (64, 128, 256, 512))
    assert shown.statistics == 2 * channels


def test_every_family_has_its_published_sizes_in_the_table():
    # Two towers are two families, of any sizes.
    of_weights = {form.model for form in FORMATS} - {object, TwoTower}
    assert of_weights <= set(model_spec.families().values())
    for spec in model_spec.published():
        model_spec.build(spec, num_classes=1000)  # has that size
    plain = {spec.partition(",")[0] for spec in PUBLISHED}
    assert plain <= set(model_spec.published())


def test_it_prints_a_model_and_says_what_is_wrong(capsys):
    show_model.main(["BiT:small", "--image_size", "8", "--channels", "1"])
    shown = capsys.readouterr().out
    assert "BiT:small, one image of 8x8x1" in shown and "activations" in shown
    assert f"{whole_small():,}" in shown
    with pytest.raises(ValueError, match=", ".join(model_spec.families())):
        show_model.main(["LeNet:5"])
    with pytest.raises(ValueError, match="it has width, depth"):
        show_model.main(["ViT:S/16,heads=3"])
    with pytest.raises(SystemExit):
        show_model.main([])
    assert "which model?" in capsys.readouterr().err


def whole_small():
    model = model_spec.build("BiT:small", num_classes=1000)
    return show_model.describe(model, (8, 8), channels=1).whole.parameters


def test_a_run_and_weights_are_shown_with_their_own_image_size(tmp_path, capsys):
    images, run = shapes_run.shared()
    del images
    flags = ["--allow_module", shapes_run.MODULE]
    model, image = show_model.of_path(str(run), [shapes_run.MODULE])
    show_model.main([str(run), *flags, "--image_size", str(image[0] or 16)])
    size = (image[0] or 16, image[1] or 16)
    count = show_model.describe(model, size, image[2]).whole.parameters
    assert f"{count:,}" in capsys.readouterr().out
    mixer = timm.models.mlp_mixer.MlpMixer(
        embed_dim=16, num_blocks=1, img_size=(16, 32), patch_size=8, num_classes=3
    )
    torch.save(mixer.state_dict(), tmp_path / "mixer.pth")
    config = {"model_args": {"img_size": [16, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    show_model.main([str(tmp_path / "mixer.pth")])
    shown = capsys.readouterr().out
    assert "16x32x3" in shown
    assert f"{sum(p.numel() for p in mixer.parameters()):,}" in shown


def test_the_table_is_markdown(monkeypatch):
    monkeypatch.setattr(model_spec, "published", lambda: ["ResNet:R18"])
    *_, line = show_model.table().splitlines()
    assert line == "| ResNet:R18 | 224 | 11.69 | 3.63 | 2.48 |"
