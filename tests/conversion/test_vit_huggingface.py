"""ViT, DeiT, SigLIP and DINOv2 of Hugging Face's transformers, in both directions."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiers
import torch_libraries
from foreign_models import randomise, relative_difference
from tiers import few

from big_vision_lite import trees
from big_vision_lite.conversion import engine, export, files, foreign, formats
from big_vision_lite.conversion.families import (
    vit_huggingface,
    vit_huggingface_dinov2,
    vit_huggingface_siglip,
)
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
transformers = pytest.importorskip("transformers")

BOUND = 1e-5  # of logits and pooled features in float32
CLASSES = 5
LABELS = {index: f"class {index}" for index in range(CLASSES)}
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
}
# DINOv2 counts its MLP in widths.
TINY_DINO = {k: v for k, v in TINY.items() if k != "intermediate_size"}
ODD = {"image_size": 35, "patch_size": 7}
NOT_SQUARE = {"image_size": [16, 32]}
TEXT = {**TINY, "vocab_size": 11, "max_position_embeddings": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of theirs: its class, its config's class and what that gets."""

    kind: str
    config: str
    arguments: dict


def vit(kind="ViTForImageClassification", **arguments):
    return Case(kind, "ViTConfig", {**TINY, "id2label": LABELS, **arguments})


def deit(kind, **arguments):
    return Case(kind, "DeiTConfig", {**TINY, "id2label": LABELS, **arguments})


def siglip(kind="SiglipVisionModel", **arguments):
    if kind == "SiglipVisionModel":
        return Case(kind, "SiglipVisionConfig", {**TINY, **arguments})
    both = {"vision_config": {**TINY, **arguments}, "text_config": TEXT}
    return Case(kind, "SiglipConfig", {**both, "id2label": LABELS})


def dino(kind="Dinov2Model", **arguments):
    config = "Dinov2Config"
    if "Registers" in kind:
        config = "Dinov2WithRegistersConfig"
    return Case(kind, config, {**TINY_DINO, "id2label": LABELS, **arguments})


CASES = {
    "vit": vit(),
    "vit, odd": vit(**ODD),
    "vit, not square": vit(**NOT_SQUARE),
    "vit, tanh": vit(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "vit, new": vit(hidden_act="gelu_new"),
    "vit, no biases": vit(qkv_bias=False),
    "vit, no head": vit("ViTModel"),
    "vit, one channel": vit(num_channels=1),
    "deit, two heads": deit("DeiTForImageClassificationWithTeacher"),
    "deit, two heads, not square": deit(
        "DeiTForImageClassificationWithTeacher", **NOT_SQUARE
    ),
    "deit, one head": deit("DeiTForImageClassification"),
    "deit, no head": deit("DeiTModel"),
    "siglip": siglip(),
    "siglip, odd": siglip(**ODD),
    "siglip, no pooling": siglip(vision_use_head=False),
    "siglip, classifier": siglip("SiglipForImageClassification"),
    "siglip, with text": siglip("SiglipModel"),
    "dinov2": dino(),
    "dinov2, odd": dino(**ODD),
    "dinov2, swiglu": dino(use_swiglu_ffn=True),
    "dinov2, classifier": dino("Dinov2ForImageClassification"),
    "dinov2, registers": dino("Dinov2WithRegistersModel", num_register_tokens=3),
    "dinov2, registers, classifier": dino("Dinov2WithRegistersForImageClassification"),
}


def build(case, seed=0):
    """Returns their model with random weights."""
    config = getattr(transformers, case.config)(**case.arguments)
    return randomise(getattr(transformers, case.kind)(config), seed)


def images(size, channels=3, seed=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, channels), np.uint8)


def their_outputs(model, image):
    """Returns "logits", "pooled" and the "tokens" of the grid, where they have it."""
    scaled = (np.float32(image).transpose(0, 3, 1, 2) - 127.5) / 127.5
    tower = model.vision_model if isinstance(model, transformers.SiglipModel) else model
    with torch.no_grad():
        found = tower(torch.from_numpy(scaled), output_hidden_states=True)
    if "logits" in found:
        return {"logits": found.logits.numpy()}
    tokens = found.last_hidden_state.numpy()
    match type(model).__name__:
        case "SiglipVisionModel" | "SiglipModel":
            pooled = found.pooler_output
            pooled = tokens.mean(1) if pooled is None else pooled.numpy()
            return {"pooled": pooled, "tokens": tokens}
        case "DeiTModel":
            return {"pooled": tokens[:, :2].mean(1), "tokens": tokens[:, 2:]}
        case _:
            before = 1 + getattr(model.config, "num_register_tokens", 0)
            return {"pooled": tokens[:, 0], "tokens": tokens[:, before:]}


def our_outputs(model, variables, image):
    params = trees.unflatten(variables)
    found = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, image)
    grid = found["grid"]
    return {**found, "tokens": grid.reshape(len(grid), -1, grid.shape[-1])}


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def load(path):
    """Returns (format, architecture, our variables), all found by content."""
    found = files.read(path)
    form = foreign.recognise(found)
    architecture = form.architecture(found)
    assert architecture.image_size is not None
    variables = formats.load(found, form, architecture, architecture.image_size)
    return form, architecture, variables


def differences(model, path):
    """Loads what `path` holds and compares it with their `model`."""
    _, architecture, variables = load(path)
    image = images(architecture.image_size, architecture.channels)
    ours = our_outputs(architecture.model, variables, image)
    theirs = their_outputs(model, image)
    return {n: relative_difference(ours[n], theirs[n]) for n in theirs if n in ours}


def put(model, variables, image_size, folder, channels=3):
    """Writes our model as theirs, as export does; returns the class of theirs."""
    form = export.find(model, Library.HUGGINGFACE, image_size, channels)
    arrays = formats.write(form, model, image_size, variables)
    config = form.describe(model, image_size, channels)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        arrays, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return getattr(transformers, config["architectures"][0])


def from_pretrained(kind, folder):
    """Loads strictly: nothing missing, left over or of another shape."""
    more = {"add_pooling_layer": False} if kind.__name__[-8:] in POOLERS else {}
    model, report = kind.from_pretrained(folder, output_loading_info=True, **more)
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[trouble], report[trouble]
    return model.eval()


POOLERS = ("ViTModel", "eiTModel")


def random_variables(model, image_size, seed=3, channels=3):
    rng = np.random.default_rng(seed)
    shapes = formats.shapes(model, image_size, channels)
    return {n: np.float32(rng.normal(size=s) * 0.4) for n, s in shapes.items()}


def ours(**fields):
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 32, "patch_size": 8}
    defaults = {
        "pooling": Pooling.CLASS_TOKEN,
        "positions": Positions.LEARNED,
        "head": Classifier(num_classes=CLASSES),
    }
    return ViT(**{**sizes, **defaults, **fields})


HEADLESS = {"head": None}
BOTH = Pooling.CLASS_TOKEN_AND_AVERAGE
EXACT = {"activation": Activation.GELU_ERF, "norm_epsilon": 1e-12}
OURS = {
    "vit": {},
    "vit, exact": EXACT,
    "vit, sines": {"positions": Positions.SINCOS},
    "vit, no positions": {"positions": Positions.NONE},
    "vit, no biases": {"qkv_bias": False},
    "vit, no head": HEADLESS,
    "deit, two heads": {"distillation_token": True},
    "deit, no head": {"distillation_token": True, **HEADLESS},
    "deit, one head": {"registers": 1},
    "siglip": {"pooling": Pooling.ATTENTION, **HEADLESS},
    "siglip, sines": {
        "pooling": Pooling.ATTENTION,
        "positions": Positions.SINCOS,
        **HEADLESS,
    },
    "siglip, average": {"pooling": Pooling.AVERAGE, **HEADLESS},
    "siglip, classifier": {"pooling": Pooling.AVERAGE},
    "siglip, classifier, sines": {
        "pooling": Pooling.AVERAGE,
        "positions": Positions.SINCOS,
    },
    "dinov2": {"layer_scale": 0.3, **HEADLESS},
    "dinov2, exact": {"layer_scale": 0.3, **HEADLESS, **EXACT},
    "dinov2, classifier": {"layer_scale": 0.3},
    "dinov2, swiglu": {"layer_scale": 1.0, "activation": Activation.SWIGLU},
    "dinov2, registers": {"layer_scale": 0.3, "registers": 2, **HEADLESS},
    "dinov2, registers, classifier": {"layer_scale": 0.3, "registers": 2},
    "dinov2, mean": {"layer_scale": 0.3, "pooling": BOTH},
    "dinov2, registers, mean": {"layer_scale": 0.3, "registers": 2, "pooling": BOTH},
}


# Each of their classes once, and each thing that a configuration may say.
FEW = (
    *("vit", "vit, not square", "vit, tanh", "vit, no biases", "vit, no head"),
    *("deit, two heads", "deit, one head", "siglip", "siglip, no pooling"),
    *("siglip, classifier", "siglip, with text", "dinov2", "dinov2, odd"),
    *("dinov2, swiglu", "dinov2, registers", "dinov2, registers, classifier"),
)


@pytest.mark.parametrize("name", few(CASES, *FEW))
def test_theirs_give_the_same_numbers_here(tmp_path, name):
    model = build(CASES[name])
    found = differences(model, save(model, tmp_path))
    assert found and max(found.values()) < BOUND


@pytest.mark.parametrize("name", few(OURS, *FEW))
def test_ours_give_the_same_numbers_there_and_come_back(tmp_path, name):
    model, size = ours(**OURS[name]), (24, 24)
    variables = random_variables(model, size)
    theirs = from_pretrained(
        put(model, variables, size, tmp_path / "put"), tmp_path / "put"
    )
    image = images(size)
    expected = their_outputs(theirs, image)
    found = our_outputs(model, variables, image)
    for output, value in expected.items():
        assert relative_difference(found[output], value) < BOUND, output

    form, architecture, back = load(save(theirs, tmp_path / "saved"))
    assert architecture.image_size == size
    if model.positions == Positions.LEARNED:
        assert architecture.model == model
    else:  # fixed positions come back as the table that they are
        back = engine.read(
            form.entries(model, size, formats.shapes(model, size, 3)),
            files.read(str(tmp_path / "saved")).arrays,
            formats.shapes(model, size, 3),
            what="saved",
            ignored=form.ignored,
        )
    assert back.keys() == variables.keys()
    assert all(np.array_equal(back[name], variables[name]) for name in back)


@pytest.mark.parametrize("name", ["vit", "deit, two heads"])
def test_images_that_are_no_squares_go_there_and_come_back(tmp_path, name):
    model, size = ours(**OURS[name]), (16, 40)
    variables = random_variables(model, size)
    theirs = from_pretrained(
        put(model, variables, size, tmp_path / "put"), tmp_path / "put"
    )
    image = images(size)
    expected = their_outputs(theirs, image)["logits"]
    found = our_outputs(model, variables, image)["logits"]
    assert relative_difference(found, expected) < BOUND
    _, architecture, back = load(save(theirs, tmp_path / "saved"))
    assert (architecture.model, architecture.image_size) == (model, size)
    assert all(np.array_equal(back[name], variables[name]) for name in back)


@pytest.mark.parametrize("library", [Library.TIMM, Library.HUGGINGFACE, Library.NPZ])
def test_the_class_token_beside_the_mean_is_refused_where_nothing_reads_it(library):
    scale = None if library == Library.NPZ else 0.3
    model = ours(layer_scale=scale, pooling=BOTH, **HEADLESS)
    with pytest.raises(ValueError, match="pooling=class_token_and_average"):
        export.find(model, library, (24, 24))
    with pytest.raises(ValueError, match="goes with final_norm=tokens"):
        ours(pooling=BOTH, final_norm=FinalNorm.POOLED)


@pytest.mark.parametrize("name", ["vit", "siglip, classifier", "dinov2, registers"])
def test_images_of_four_channels_go_there_and_come_back(tmp_path, name):
    grey = (127.5,) * 4
    model, size = ours(**OURS[name], mean=grey, std=grey), (24, 24)
    variables = random_variables(model, size, channels=4)
    theirs = from_pretrained(
        put(model, variables, size, tmp_path / "put", channels=4), tmp_path / "put"
    )
    image = images(size, channels=4)
    expected = their_outputs(theirs, image)
    found = our_outputs(model, variables, image)
    for output, value in expected.items():
        assert relative_difference(found[output], value) < BOUND, output
    _, architecture, back = load(save(theirs, tmp_path / "saved"))
    assert architecture.channels == 4
    assert all(np.array_equal(back[name], variables[name]) for name in back)


def changed(case, tmp_path, change, seed=0):
    """Returns the logits' difference after `change(their state dict)` of a copy."""
    model = build(case, seed)
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
    expected = their_outputs(model, image)["logits"]
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
    expected = their_outputs(model, image)["logits"]
    assert relative_difference(found, expected) > BOUND


@pytest.mark.parametrize("row", [0, 1])
def test_the_positions_of_class_and_distillation_token_are_not_lost(tmp_path, row):
    def drop(state):
        state["deit.embeddings.position_embeddings"][:, row] = 0

    case = CASES["deit, two heads"]
    assert changed(case, tmp_path, drop) > BOUND


@pytest.mark.parametrize("pair", [("q", "k"), ("k", "v"), ("q", "v")])
def test_query_key_and_value_do_not_trade_places(tmp_path, pair):
    def swap(state):
        first, second = (f"vit.layers.1.attention.{part}_proj.weight" for part in pair)
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["vit"], tmp_path, swap) > BOUND


def test_the_blocks_of_a_joined_query_key_value_do_not_trade_places(tmp_path):
    def roll(state):
        name = "head.attention.in_proj_weight"
        state[name] = torch.roll(state[name], TINY["hidden_size"], 0)

    assert changed(CASES["siglip"], tmp_path, roll) > BOUND


def test_gate_and_value_of_swiglu_do_not_trade_places(tmp_path):
    def swap(state):
        first, second = (
            f"encoder.layer.0.mlp.{part}_proj.weight" for part in ("gate", "up")
        )
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["dinov2, swiglu"], tmp_path, swap) > BOUND


def test_class_and_distillation_heads_do_not_trade_places(tmp_path):
    def swap(state):
        first, second = "cls_classifier.weight", "distillation_classifier.weight"
        state[first], state[second] = state[second], state[first]

    assert changed(CASES["deit, two heads"], tmp_path, swap) > BOUND


def test_rows_and_columns_of_positions_do_not_trade_places(tmp_path):
    def transpose(state):
        name = "vit.embeddings.position_embeddings"
        grid = state[name][:, 1:].reshape(2, 4, -1)
        state[name][:, 1:] = grid.transpose(0, 1).reshape(1, 8, -1)

    assert changed(CASES["vit, not square"], tmp_path, transpose) > BOUND


def test_classification_does_not_go_through_the_pooler(tmp_path):
    model = build(vit("ViTModel"))
    _, architecture, variables = load(save(model, tmp_path))
    assert any("pooler" in note for note in architecture.notes)
    image = images((24, 24))
    found = our_outputs(architecture.model, variables, image)["pooled"]
    scaled = (np.float32(image).transpose(0, 3, 1, 2) - 127.5) / 127.5
    with torch.no_grad():
        through = model(torch.from_numpy(scaled)).pooler_output.numpy()
    assert relative_difference(found, through) > BOUND
    # So a tanh layer before our head has no place there.
    head = Classifier(num_classes=CLASSES, hidden_dim=7)
    with pytest.raises(ValueError, match=r"head.hidden_dim=7.*--to npz"):
        export.find(ours(head=head), Library.HUGGINGFACE, (24, 24))


def test_the_siglip_classifier_reads_the_average_and_not_its_own_pooling(tmp_path):
    def change(state):
        state["vision_model.head.probe"] += 1

    assert changed(CASES["siglip, classifier"], tmp_path, change) < BOUND


def test_the_head_of_the_distillation_token_is_half_of_the_logits(tmp_path):
    model = build(CASES["deit, two heads"])
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


@pytest.mark.parametrize("name", ["vit", "deit, two heads", "siglip", "dinov2"])
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
    assert architecture.image_size == (24, 24)
    assert any("27x27" in note for note in architecture.notes)
    image = images((27, 27))
    found = our_outputs(architecture.model, variables, image[:, :24, :24])["pooled"]
    expected = their_outputs(model, image)["pooled"]
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": Pooling.ATTENTION}, "pooling=attention.*--to timm"),
        ({"final_norm": FinalNorm.POOLED}, "final_norm=pooled.*--to timm"),
        ({"qk_norm": True}, "qk_norm=True.*--to timm"),
        ({"registers": 3}, "registers=3.*--to timm"),
        ({"activation": Activation.SWIGLU}, "activation=swiglu.*--to timm"),
        ({"distillation_token": True, "layer_scale": 0.1}, "layer_scale=0.1.*timm"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        export.find(ours(**fields), Library.HUGGINGFACE, (24, 24))


def test_an_average_does_not_go_to_the_class_that_reads_token_zero():
    model = ours(pooling=Pooling.AVERAGE)
    reason = vit_huggingface.HuggingFaceViT().refusal(model, (24, 24), 3)
    assert "this model pooling=average" in reason.sentence
    form = export.find(model, Library.HUGGINGFACE, (24, 24))
    assert form.name == "Hugging Face SigLIP"


@pytest.mark.parametrize("name", ["siglip", "dinov2"])
def test_images_that_are_no_squares_do_not_go_where_squares_are_assumed(name):
    model = ours(**OURS[name])
    with pytest.raises(ValueError, match="square.*16x32 px.*--to timm"):
        export.find(model, Library.HUGGINGFACE, (16, 32))


def test_a_dinov2_mlp_is_a_whole_number_of_widths_wide():
    model = ours(layer_scale=1.0, mlp_dim=40)
    with pytest.raises(ValueError, match="mlp_dim=40 at width=16.*--to timm"):
        export.find(model, Library.HUGGINGFACE, (24, 24))


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
    shapes = formats.shapes(architecture.model, architecture.image_size, 3)
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
