"""ViT, DeiT, SigLIP and DINOv2 of Hugging Face's transformers, in both directions."""

import dataclasses
import json

import numpy as np
import pytest
import tiers
import torch_libraries
from conversion_cases import THEIRS
from conversion_cases.vit_huggingface import TINY_HF as TINY
from conversion_cases.vit_huggingface import huggingface_vit, siglip, vit
from foreign_models import randomise, relative_difference
from tiers import few

from big_vision_lite.conversion import files, formats
from big_vision_lite.conversion.families import (
    vit_huggingface,
    vit_huggingface_dinov2,
    vit_huggingface_siglip,
)
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
transformers = pytest.importorskip("transformers")
for library in ("timm", "torchvision"):
    pytest.importorskip(library)
import both_sides  # noqa: E402
from both_sides import BOUND, their_outputs  # noqa: E402

CASES = {
    name.removeprefix("HF "): made
    for name, made in THEIRS.items()
    if name.startswith("HF ")
}


def build(case):
    return randomise(case.build(), seed=0)


def images(size, channels=3):
    return both_sides.pixels(size, channels)


def our_outputs(model, variables, image):
    return both_sides.our_outputs(model, variables, image)


def scaled(image):
    return (np.float32(image) - 127.5) / 127.5


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def load(path):
    """Returns (format, architecture, our variables), all found by content."""
    found = both_sides.read(files.read(path))
    return found.form, found.architecture, found.variables


def differences(model, path):
    """Loads what `path` holds and compares it with their `model`."""
    _, architecture, variables = load(path)
    image = images(architecture.image_size_px, architecture.channels)
    ours = our_outputs(architecture.model, variables, image)
    theirs = their_outputs(model, scaled(image))
    return {n: relative_difference(ours[n], theirs[n]) for n in theirs if n in ours}


def changed(case, tmp_path, change):
    """Returns the logits' difference after `change(their state dict)` of a copy."""
    model = build(case)
    path = save(model, tmp_path)
    assert max(differences(model, path).values()) < BOUND
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    model.load_state_dict(state, strict=True)
    return max(differences(model, path).values())


def small_tokens(model):
    """Makes tokens as small as training starts with: then norm constants show."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "embeddings" in name:
                tensor.mul_(0.02)
    return model


def test_the_two_gelus_are_two_models(tmp_path):
    model = build(vit())
    _, architecture, variables = load(save(model, tmp_path))
    image = images((24, 24))
    wrong = architecture.model.clone(activation=Activation.GELU_TANH)
    found = our_outputs(wrong, variables, image)["logits"]
    expected = their_outputs(model, scaled(image))["logits"]
    assert relative_difference(found, expected) > BOUND


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_the_default_norm_constant_is_not_that_of_big_vision(tmp_path, epsilon):
    model = small_tokens(build(vit()))  # 1e-12
    path = save(model, tmp_path)
    assert max(differences(model, path).values()) < BOUND
    _, architecture, variables = load(path)
    assert architecture.model.norm_epsilon == 1e-12
    image = images((24, 24))
    wrong = architecture.model.clone(norm_epsilon=epsilon)
    found = our_outputs(wrong, variables, image)["logits"]
    expected = their_outputs(model, scaled(image))["logits"]
    assert relative_difference(found, expected) > BOUND


@pytest.mark.parametrize("row", [0, 1])
def test_the_positions_of_class_and_distillation_token_are_not_lost(tmp_path, row):
    def drop(state):
        state["deit.embeddings.position_embeddings"][:, row] = 0

    case = CASES["DeiT, two heads"]
    assert changed(case, tmp_path, drop) > BOUND


@pytest.mark.parametrize("pair", [("q", "k"), ("k", "v"), ("q", "v")])
def test_query_key_and_value_do_not_trade_places(tmp_path, pair):
    def swap(state):
        first, second = (f"vit.layers.1.attention.{part}_proj.weight" for part in pair)
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["ViT"], tmp_path, swap) > BOUND


def test_the_blocks_of_a_joined_query_key_value_do_not_trade_places(tmp_path):
    def roll(state):
        name = "head.attention.in_proj_weight"
        state[name] = torch.roll(state[name], TINY["hidden_size"], 0)

    assert changed(CASES["SigLIP"], tmp_path, roll) > BOUND


def test_gate_and_value_of_swiglu_do_not_trade_places(tmp_path):
    def swap(state):
        first, second = (
            f"encoder.layer.0.mlp.{part}_proj.weight" for part in ("gate", "up")
        )
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["DINOv2, swiglu"], tmp_path, swap) > BOUND


def test_class_and_distillation_heads_do_not_trade_places(tmp_path):
    def swap(state):
        first, second = "cls_classifier.weight", "distillation_classifier.weight"
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["DeiT, two heads"], tmp_path, swap) > BOUND


def test_rows_and_columns_of_positions_do_not_trade_places(tmp_path):
    def transpose(state):
        name = "vit.embeddings.position_embeddings"
        grid = state[name][:, 1:].reshape(2, 4, -1)
        state[name][:, 1:] = grid.transpose(0, 1).reshape(1, 8, -1)

    assert changed(CASES["ViT, not square"], tmp_path, transpose) > BOUND


def test_classification_does_not_go_through_the_pooler(tmp_path):
    model = build(vit("ViTModel"))
    _, architecture, variables = load(save(model, tmp_path))
    assert any("pooler" in each.words for each in architecture.assumptions)
    image = images((24, 24))
    found = our_outputs(architecture.model, variables, image)["pooled"]
    scaled = (np.float32(image).transpose(0, 3, 1, 2) - 127.5) / 127.5
    with torch.no_grad():
        through = model(torch.from_numpy(scaled)).pooler_output.numpy()
    assert relative_difference(found, through) > BOUND


def test_the_siglip_classifier_reads_the_average_and_not_its_own_pooling(tmp_path):
    def change(state):
        state["vision_model.head.probe"] += 1

    assert changed(CASES["SigLIP, classifier"], tmp_path, change) < BOUND


def test_the_head_of_the_distillation_token_is_half_of_the_logits(tmp_path):
    model = build(CASES["DeiT, two heads"])
    _, architecture, variables = load(save(model, tmp_path))
    image = images((24, 24))
    found = our_outputs(architecture.model, variables, image)
    scaled = (np.float32(image).transpose(0, 3, 1, 2) - 127.5) / 127.5
    with torch.no_grad():
        theirs = model(torch.from_numpy(scaled))
    for ours_, theirs_ in (
        ("class_logits", theirs.cls_logits),
        ("distillation_logits", theirs.distillation_logits),
        ("logits", (theirs.cls_logits + theirs.distillation_logits) / 2),
    ):
        assert relative_difference(found[ours_], theirs_.numpy()) < BOUND


@pytest.mark.parametrize("name", ["ViT", "DeiT, two heads", "SigLIP", "DINOv2"])
def test_without_config_json_it_is_asked_for(tmp_path, name):
    path = save(build(CASES[name]), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: put that file beside"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit_mae"}, r'model_type "vit_mae".*not read here; vit is'),
        ({"hidden_act": "quick_gelu"}, r'hidden_act "quick_gelu".*gelu_pytorch_tanh'),
        ({"patch_size": [8, 4]}, r"only squares"),
        ({"hidden_size": 32}, r"gives .*the model has"),
        ({"num_hidden_layers": 2}, r"encoder\.layer\.2\..*only in the file"),
        ({"image_size": 32}, r"10 positions, not 17"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    path = save(build(vit()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_an_edge_that_fills_no_patch_is_cut_off(tmp_path):
    model = build(siglip(image_size=27, patch_size=8))  # as So400m/14 at 384
    _, architecture, variables = load(save(model, tmp_path))
    assert architecture.image_size_px == (24, 24)
    assert any("27x27" in each.words for each in architecture.assumptions)
    image = images((27, 27))
    found = our_outputs(architecture.model, variables, image[:, :24, :24])["pooled"]
    expected = their_outputs(model, scaled(image))["pooled"]
    assert relative_difference(found, expected) < BOUND


def test_a_config_that_says_little_means_the_defaults_of_theirs():
    for defaults, config in (
        (vit_huggingface.DEFAULTS, transformers.ViTConfig()),
        (vit_huggingface.DEFAULTS, transformers.DeiTConfig()),
        (vit_huggingface_siglip.SIGLIP, transformers.SiglipVisionConfig()),
        (vit_huggingface_dinov2.DINOV2, transformers.Dinov2Config()),
        (vit_huggingface_dinov2.REGISTERS, transformers.Dinov2WithRegistersConfig()),
    ):
        theirs = config.to_dict()
        assert defaults == {key: theirs[key] for key in defaults}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of theirs: its class, its config's class and what that gets."""

    kind: str
    config: str
    arguments: dict

    def build(self):
        return huggingface_vit(self.kind, self.config, **self.arguments)


GIANT = {
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_hidden_layers": 40,
    "use_swiglu_ffn": True,
    "image_size": 518,
    "patch_size": 14,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
# Case, format, the name by which it sees what kind of head there is, and how many
# tokens of theirs have a position too, which comes in as one vector.
PUBLISHED = {
    "ViT-B/16": (
        Case("ViTForImageClassification", "ViTConfig", {"num_labels": 1000}),
        vit_huggingface.HuggingFaceViT(),
        "classifier.weight",
        1,
    ),
    "DeiT-B/16, distilled": (
        Case(
            "DeiTForImageClassificationWithTeacher",
            "DeiTConfig",
            {"num_labels": 1000},
        ),
        vit_huggingface.HuggingFaceDeiT(),
        "cls_classifier.weight",
        2,
    ),
    "SigLIP B/16": (
        Case("SiglipVisionModel", "SiglipVisionConfig", {}),
        vit_huggingface_siglip.HuggingFaceSigLIP(),
        "vision_model.head.probe",
        0,
    ),
    "SigLIP So400m/14": (
        Case("SiglipVisionModel", "SiglipVisionConfig", SO400M),
        vit_huggingface_siglip.HuggingFaceSigLIP(),
        "vision_model.head.probe",
        0,
    ),
    "DINOv2 B/14": (
        Case("Dinov2Model", "Dinov2Config", {"image_size": 518}),
        vit_huggingface_dinov2.FORMATS[0],
        None,
        1,
    ),
    "DINOv2 g/14, registers": (
        Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", GIANT),
        vit_huggingface_dinov2.FORMATS[1],
        None,
        1,
    ),
}


@pytest.mark.parametrize("name", few(PUBLISHED, "ViT-B/16", marks=tiers.PUBLISHED))
def test_published_sizes_have_as_many_parameters_as_theirs(name):
    case, form, head, folded = PUBLISHED[name]
    config = getattr(transformers, case.config)(**case.arguments)
    with torch.device("meta"):
        model = getattr(transformers, case.kind)(config)
    found = Weights(
        arrays={head: np.zeros((1000, 1))} if head else {},
        path=name,
        config=config.to_dict(),
    )
    architecture = form.architecture(found)
    shapes = formats.shapes(architecture.model, architecture.image_size_px, 3)
    expected = sum(
        tensor.numel()
        for parameter, tensor in model.named_parameters()
        if "mask_token" not in parameter
    )
    expected -= folded * config.hidden_size
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == expected


@pytest.mark.slow
@pytest.mark.published
@pytest.mark.parametrize("name", ["ViT-B/16", "SigLIP B/16"])
def test_published_sizes_give_the_same_numbers_here(tmp_path, name):
    case, *_ = PUBLISHED[name]
    model = build(case)
    assert max(differences(model, save(model, tmp_path)).values()) < BOUND
