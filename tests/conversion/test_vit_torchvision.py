"""ViTs of torchvision in our terms and ours in torchvision's: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch_libraries
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, few

from big_vision_lite import trees
from big_vision_lite.conversion import export, foreign, formats, preprocessing
from big_vision_lite.conversion.families import vit_torchvision
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.preprocessing import from_torchvision
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
models = pytest.importorskip("torchvision.models")

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
TINY = dict(num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7)
CASES = {
    "224": dict(image_size=224, patch_size=16),
    "odd": dict(image_size=35, patch_size=7),
    "representation": dict(image_size=24, patch_size=8, representation_size=20),
}
SIZES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def built(case, seed=0):
    model = models.VisionTransformer(**TINY, **CASES[case])
    return randomise(model, seed=seed)


def weights_of(model, arguments):
    arrays = {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}
    config = {"builder": "VisionTransformer", "arguments": arguments}
    return Weights(arrays=arrays, path="file", config=config if arguments else {})


def read(weights):
    """Returns the format, the architecture and our variables of some weights."""
    form = foreign.recognise(weights)
    assert form.name == "torchvision ViT"
    found = form.architecture(weights)
    return form, found, formats.load(weights, form, found, found.image_size)


def difference(model, variables, theirs, side):
    """Returns how far logits and pooled features of both sides are apart."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (2, side, side, 3)).astype(np.float32)
    params = trees.unflatten({n: jnp.asarray(x) for n, x in variables.items()})
    run = jax.jit(lambda params, image: model.apply({"params": params}, image))
    ours = run(params, jnp.asarray(image))
    x = torch.from_numpy(np.moveaxis(image / 127.5 - 1, -1, 1).astype(np.float32))
    pooled = []
    handle = theirs.encoder.register_forward_hook(lambda *a: pooled.append(a[2][:, 0]))
    with torch.no_grad():
        logits = theirs(x)
    handle.remove()
    return max(
        relative_difference(ours["logits"], logits.numpy()),
        relative_difference(ours["pooled"], pooled[0].numpy()),
    )


@pytest.mark.parametrize("case", CASES)
def test_theirs_give_the_same_numbers_here(case):
    theirs = built(case)
    _, found, variables = read(weights_of(theirs, TINY))
    side = CASES[case]["image_size"]
    assert found.image_size == (side, side) and not found.notes
    assert difference(found.model, variables, theirs, side) < BOUND
    other = found.model.clone(activation=Activation.GELU_TANH)
    assert difference(other, variables, theirs, side) > BOUND
    other = found.model.clone(norm_epsilon=1e-4)
    assert difference(other, variables, theirs, side) > BOUND


@pytest.mark.parametrize("case", CASES)
def test_ours_go_there_as_a_folder_and_come_back_bit_for_bit(case, tmp_path):
    form, found, variables = read(weights_of(built(case, seed=1), TINY))
    side = CASES[case]["image_size"]
    road = from_torchvision(found.image_size)
    model = found.model.clone(mean=tuple(road.mean), std=tuple(road.std))
    exported = export.export(
        model, variables, road, 3, (), Library.TORCHVISION, str(tmp_path / "out")
    )
    export.write(exported, tmp_path / "out")
    theirs = parity.load(exported, tmp_path / "out")
    assert difference(found.model, variables, theirs, side) < BOUND
    back = foreign.load(str(tmp_path / "out"))
    assert back.model == model and back.image_size == (side, side)
    assert back.variables.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(back.variables[name], array, err_msg=name)
    report = parity.compare(
        model,
        {"params": trees.unflatten(variables)},
        road,
        3,
        exported,
        tmp_path / "out",
    )
    assert report.passed and report.pixels <= 1
    assert "encoder/block_01" in report.text()


def test_the_names_of_the_published_files_are_read():
    """Their MLPs are linear_1 and linear_2, and no configuration comes along."""
    theirs = built("odd")
    weights = weights_of(theirs, TINY)
    _, _, today = read(weights_of(theirs, TINY))
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): x
        for name, x in weights.arrays.items()
    }
    assert old.keys() != weights.arrays.keys()
    _, _, first = read(Weights(arrays=old, path="file", config={"arguments": TINY}))
    for name, array in today.items():
        np.testing.assert_array_equal(first[name], array, err_msg=name)
    road = preprocessing.read(
        weights, vit_torchvision.TorchvisionViT.assumes, (224, 224)
    )
    assert (
        road.mean[0] == pytest.approx(0.485 * 255) and "torchvision's" in road.notes[0]
    )


@pytest.mark.parametrize("size", few(SIZES, "vit_b_16", marks=PUBLISHED))
def test_published_sizes_have_the_shapes_and_the_names_of_theirs(size):
    with torch.device("meta"):
        theirs = getattr(models, size)()
    shapes = {n: tuple(x.shape) for n, x in theirs.state_dict().items()}
    arrays = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    weights = Weights(arrays=arrays, path="file")
    form = foreign.recognise(weights)
    found = form.architecture(weights)
    assert found.model.num_heads == theirs.encoder.layers[0].num_heads
    ours = formats.shapes(found.model, found.image_size, 3)
    variables = {n: np.broadcast_to(np.float32(0), s) for n, s in ours.items()}
    written = formats.write(form, found.model, found.image_size, variables)
    assert {n: x.shape for n, x in written.items()} == shapes
    # Ours has no position of the class token.
    assert sum(np.prod(s) for s in ours.values()) + found.model.width == sum(
        np.prod(s) for s in shapes.values()
    )


@pytest.mark.slow
@pytest.mark.published
def test_a_published_size_gives_the_logits_of_torchvision():
    theirs = randomise(models.vit_b_16(), seed=0)
    _, found, variables = read(weights_of(theirs, {}))
    assert difference(found.model, variables, theirs, 224) < BOUND


def test_positions_and_projections_in_another_order_are_seen():
    theirs = built("odd")
    weights = weights_of(theirs, TINY)
    for name, change in (
        ("encoder.pos_embedding", lambda x: np.roll(x, 1, axis=1)),
        (
            "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
            lambda x: np.roll(x, 32, axis=0),
        ),
    ):
        arrays = {**weights.arrays, name: change(weights.arrays[name])}
        _, found, variables = read(
            Weights(arrays=arrays, path="", config=weights.config)
        )
        assert difference(found.model, variables, theirs, 35) > BOUND


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pooling=Pooling.AVERAGE), "pooling=average"),
        (dict(activation=Activation.GELU_TANH), "activation=gelu_tanh"),
        (dict(head=None), "head=Classifier, this model head=none"),
        (dict(registers=2), "registers=2"),
        (dict(image_size=(16, 32)), "images of 16x32 px"),
    ],
)
def test_what_torchvision_has_not_is_refused_with_a_way_out(fields, message):
    image_size = fields.pop("image_size", (16, 16))
    plain = dict(pooling=Pooling.CLASS_TOKEN, activation=Activation.GELU_ERF)
    plain |= dict(head=Classifier(num_classes=3), patch_size=8)
    model = ViT(width=32, depth=1, mlp_dim=32, num_heads=2, **{**plain, **fields})
    with pytest.raises(ValueError, match=f"{message}.*--to timm"):
        export.find(model, Library.TORCHVISION, image_size)


def test_heads_that_nothing_tells_are_assumed_and_said_or_asked_for():
    hint = r'{"arguments": {"num_heads": 6}}'
    weights = weights_of(built("odd"), {})
    with pytest.raises(ValueError, match=f"32 is no multiple of 64.*{hint}"):
        read(weights)
    wide = models.VisionTransformer(**{**TINY, **CASES["odd"], "hidden_dim": 128})
    _, found, _ = read(weights_of(wide, {}))
    assert found.model.num_heads == 2
    assert found.notes[0].startswith("num_heads=2 assumed") and hint in found.notes[0]


def test_positions_that_make_no_square_are_refused():
    weights = weights_of(built("odd"), TINY)
    name = "encoder.pos_embedding"
    weights.arrays[name] = weights.arrays[name][:, :-1]
    with pytest.raises(ValueError, match="24 positions of patches, which make no"):
        read(weights)
