"""MLP-Mixer: the model, and its weights to and from timm and npz archives."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
import torch_libraries
from foreign_models import randomise, relative_difference
from tiers import few

from big_vision_lite import trees
from big_vision_lite.conversion import foreign, formats
from big_vision_lite.conversion.families.mixer import NAMES, ArchivedMixer, TimmMixer
from big_vision_lite.conversion.formats import Architecture
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.runtime import flops

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
TANH = functools.partial(torch.nn.GELU, approximate="tanh")
# timm's own names fix width and depth: tiny ones are built by its class.
TINY = dict(embed_dim=32, num_blocks=3, num_classes=7)
SIZES = {
    "224": dict(img_size=224, patch_size=32),
    "odd": dict(img_size=35, patch_size=7),
    "not square": dict(img_size=(16, 40), patch_size=8),
    "no head": dict(img_size=35, patch_size=7, num_classes=0),
    "gray": dict(img_size=35, patch_size=7, in_chans=1),
}


@functools.cache
def their_model(case, tanh=False):
    arguments = TINY | SIZES[case] | (dict(act_layer=TANH) if tanh else {})
    return randomise(timm.models.mlp_mixer.MlpMixer(**arguments), seed=0)


def image_size(case):
    size = SIZES[case]["img_size"]
    return (size, size) if isinstance(size, int) else size


def weights_of(module, **config):
    arrays = {name: value.numpy() for name, value in module.state_dict().items()}
    return Weights(arrays=arrays, path="file", config=config)


@functools.cache
def imported(case, tanh=False):
    weights = weights_of(
        their_model(case, tanh), model_args={"img_size": list(image_size(case))}
    )
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    return architecture, formats.load(weights, form, architecture, image_size(case))


def images(case):
    rng = np.random.default_rng(0)
    channels = SIZES[case].get("in_chans", 3)
    return rng.uniform(0, 255, (2, *image_size(case), channels)).astype(np.float32)


def ours(model, variables, image):
    params = trees.unflatten({n: jnp.asarray(a) for n, a in variables.items()})
    run = jax.jit(lambda params, image: model.apply({"params": params}, image))
    return {n: np.asarray(a) for n, a in run(params, image).items()}


def theirs(model, image):
    x = torch.from_numpy((image - 127.5) / np.float32(127.5)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = model.forward_features(x)
        return {
            "grid": features.numpy(),
            "pooled": model.forward_head(features, pre_logits=True).numpy(),
            "logits": model.forward_head(features).numpy(),
        }


def differences(found, expected):
    return {
        name: relative_difference(
            np.asarray(found[name]).reshape(expected[name].shape), expected[name]
        )
        for name in ("grid", "pooled", "logits")
        if name in found
    }


@pytest.mark.parametrize("case", SIZES)
def test_an_archive_gives_the_logits_of_the_timm_model_with_the_same_weights(
    case, tmp_path
):
    """The names of vision_transformer and big_vision, one array kept as bfloat16."""
    module = their_model(case, tanh=True)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    kernel = "blocks.0.mlp_tokens.fc1.weight"
    half = torch.from_numpy(state[kernel]).to(torch.bfloat16)
    module.state_dict()[kernel].copy_(half.float())
    expected = theirs(module, images(case))
    written = {
        "stem/kernel": state["stem.proj.weight"].transpose(2, 3, 1, 0),
        "stem/bias": state["stem.proj.bias"],
        "pre_head_layer_norm/scale": state["norm.weight"],
        "pre_head_layer_norm/bias": state["norm.bias"],
    }
    for i in range(TINY["num_blocks"]):
        for layer_norm, norm, mixing, mlp in (
            ("LayerNorm_0", "norm1", "token_mixing", "mlp_tokens"),
            ("LayerNorm_1", "norm2", "channel_mixing", "mlp_channels"),
        ):
            block, theirs_ = f"MixerBlock_{i}", f"blocks.{i}"
            written[f"{block}/{layer_norm}/scale"] = state[f"{theirs_}.{norm}.weight"]
            written[f"{block}/{layer_norm}/bias"] = state[f"{theirs_}.{norm}.bias"]
            for number in (0, 1):
                dense = f"{theirs_}.{mlp}.fc{number + 1}"
                target = f"{block}/{mixing}/Dense_{number}"
                written[f"{target}/kernel"] = state[f"{dense}.weight"].T
                written[f"{target}/bias"] = state[f"{dense}.bias"]
    if "head.weight" in state:
        written["head/kernel"] = state["head.weight"].T
        written["head/bias"] = state["head.bias"]
    name = "MixerBlock_0/token_mixing/Dense_0/kernel"
    written[name] = half.view(torch.int16).numpy().T.copy().view("V2")
    path = tmp_path / "mixer.npz"
    np.savez(path, **written)
    config = {"image_size": list(image_size(case))}
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = foreign.load(str(path))
    assert found.format == ArchivedMixer().name
    assert found.image_size_px == image_size(case)
    assert found.model.activation == Activation.GELU_TANH
    difference = differences(ours(found.model, found.variables, images(case)), expected)
    print(f"{case}: {difference}")
    assert max(difference.values()) <= BOUND
    back = formats.write(
        ArchivedMixer(), found.model, found.image_size_px, found.variables
    )
    assert back.keys() == written.keys()
    for name, array in back.items():
        if written[name].dtype != "V2":
            np.testing.assert_array_equal(array, written[name], err_msg=name)


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_the_other_gelu_is_not_equal(tanh):
    architecture, variables = imported("odd", tanh)
    wrong = Activation.GELU_ERF if tanh else Activation.GELU_TANH
    model = architecture.model.clone(activation=wrong)
    expected = theirs(their_model("odd", tanh), images("odd"))
    found = differences(ours(model, variables, images("odd")), expected)
    assert found["logits"] > 10 * BOUND


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_another_epsilon_of_the_norms_is_not_equal(epsilon):
    """On faint images: where the variance of tokens is small, as in real stems."""
    arguments = TINY | SIZES["odd"]
    norm = functools.partial(torch.nn.LayerNorm, eps=epsilon)
    module = timm.models.mlp_mixer.MlpMixer(**arguments, norm_layer=norm)
    module = randomise(module, seed=0)
    for name in ("stem.proj.weight", "stem.proj.bias"):
        module.state_dict()[name].mul_(1e-2)
    weights = weights_of(module)
    form = TimmMixer()
    architecture = form.architecture(weights)
    variables = formats.load(weights, form, architecture, (35, 35))
    found = ours(architecture.model, variables, images("odd"))
    assert differences(found, theirs(module, images("odd")))["logits"] > 2 * BOUND
    for norm_module in module.modules():
        if isinstance(norm_module, torch.nn.LayerNorm):
            norm_module.eps = 1e-6
    assert differences(found, theirs(module, images("odd")))["logits"] <= BOUND


@pytest.mark.parametrize("size", few(MlpMixer.published, "S/16", marks=tiers.PUBLISHED))
def test_published_sizes_have_the_parameters_of_timm_and_of_the_paper(size):
    # Millions without a head, Table 1 of arXiv:2105.01601.
    millions = (19, 18, 60, 59, 206, 207, 431)
    paper = dict(zip(MlpMixer.published, millions, strict=True))[size]
    model = MlpMixer.of(size, head=Classifier(num_classes=1000))
    shapes = formats.shapes(model, (224, 224), 3)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    head = 1000 * (model.width + 1)
    assert (count - head) / 1e6 == pytest.approx(paper, abs=0.5)
    key = (model.width, model.depth, model.patch_size)
    if key not in NAMES:
        return  # H/14 is not in timm
    with torch.device("meta"):
        module = timm.create_model(NAMES[key])
    assert count == sum(p.numel() for p in module.parameters())


def test_a_published_size_is_described_so_that_timm_builds_it():
    model = MlpMixer.of(
        "S/32", head=Classifier(num_classes=7), activation=Activation.GELU_ERF
    )
    described = json.loads(json.dumps(TimmMixer().describe(model, (64, 96), 3)))
    with torch.device("meta"):
        module = timm.create_model(described["architecture"], **described["model_args"])
    shapes = {name: tuple(v.shape) for name, v in module.state_dict().items()}
    ours = {n: np.zeros(s) for n, s in formats.shapes(model, (64, 96), 3).items()}
    arrays = formats.write(TimmMixer(), model, (64, 96), ours)
    assert {name: array.shape for name, array in arrays.items()} == shapes


@pytest.mark.slow
@pytest.mark.published
def test_a_published_size_gives_timms_logits():
    module = randomise(timm.create_model("mixer_b16_224"), seed=0)
    weights = weights_of(module)
    architecture = TimmMixer().architecture(weights)
    assert architecture.image_size_px == (224, 224)
    assert architecture.model == MlpMixer.of(
        "B/16", head=Classifier(num_classes=1000), activation=Activation.GELU_ERF
    )
    variables = formats.load(weights, TimmMixer(), architecture, (224, 224))
    image = images("224")[:1]
    found = differences(
        ours(architecture.model, variables, image), theirs(module, image)
    )
    print(found)
    assert max(found.values()) <= BOUND


def test_every_parameter_has_a_gradient_and_branches_drop_in_training():
    model = MlpMixer(
        width=16,
        depth=2,
        token_mlp_dim=8,
        channel_mlp_dim=32,
        patch_size=4,
        head=Classifier(num_classes=3),
        stochastic_depth=0.5,
    )
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3)), "u1")
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: x + 0.01, params)  # the head starts at zero

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, train):
        outputs = model.apply(
            {"params": params},
            image,
            train=train,
            rngs={"dropout": jax.random.key(1)},
        )
        assert outputs["grid"].shape == (4, 2, 3, 16)
        return jnp.square(outputs["logits"]).sum()

    gradients = jax.grad(loss)(params, False)
    for name, gradient in trees.flatten(gradients).items():
        assert np.abs(gradient).max() > 0, name
    assert loss(params, True) != loss(params, False)


def test_flops_equal_the_formula():
    model = MlpMixer.of("B/16", head=Classifier(num_classes=1000))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    counted = flops.count(model.apply, params, image)
    mixing = 12 * (2 * 196 * 384 * 768 + 2 * 196 * 768 * 3072)
    assert counted == 2 * (196 * 768 * 768 + mixing + 768 * 1000)


def test_gated_mixers_and_grids_that_nothing_tells_are_refused():
    gated = timm.models.mlp_mixer.MlpMixer(
        **(TINY | SIZES["odd"]), mlp_layer=timm.layers.GluMlp
    )
    weights = weights_of(gated)
    with pytest.raises(ValueError, match="gMixer"):
        foreign.recognise(weights).architecture(weights)
    weights = weights_of(their_model("not square"))
    with pytest.raises(ValueError, match=r"10 patches of 8 px.*img_size"):
        TimmMixer().architecture(weights)


@pytest.mark.parametrize("size", ["XL/16", "B", "B/x"])
def test_an_unknown_size_names_those_there_are(size):
    with pytest.raises(ValueError, match=r"S, B, L, H.*B/16"):
        MlpMixer.of(size)


def test_architecture_is_what_the_names_say():
    architecture, _ = imported("gray")
    assert architecture.model.activation == Activation.GELU_ERF
    assert architecture == Architecture(
        model=MlpMixer(
            width=32,
            depth=3,
            token_mlp_dim=16,
            channel_mlp_dim=128,
            patch_size=7,
            head=Classifier(num_classes=7),
            activation=Activation.GELU_ERF,
        ),
        image_size_px=(35, 35),
        channels=1,
    )
