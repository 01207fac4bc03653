"""ResNet, ResNeXt and Wide ResNet of timm, torchvision and Hugging Face; both ways."""

import functools
import json

import jax
import numpy as np
import pytest
import torch_libraries
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, SLOW, few

from big_vision_lite import trees
from big_vision_lite.conversion import export, foreign, formats, preprocessing
from big_vision_lite.conversion.families import resnet
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import Block, Stem
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import SIZES, ResNet
from big_vision_lite.runtime import flops
from big_vision_lite.training import state as state_lib

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")
import parity  # noqa: E402
from torch.utils import flop_counter  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

pytestmark = pytest.mark.parity

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
CLASSES = 7
# Even at every stride, odd at every stride, and neither square nor of one kind.
IMAGES = {"even": (64, 64), "odd": (65, 65), "not square": (48, 82)}
EVEN = IMAGES["even"]
HF, HF_BODY, TIMM, TORCHVISION = resnet.FORMATS


def timm_model(name="resnet50", **arguments):
    narrow = dict(layers=(2, 1, 1, 2), channels=(8, 16, 32, 64), num_classes=CLASSES)
    return timm.create_model(name, **{**narrow, **arguments})


def torchvision_model(block=Bottleneck, layers=(1, 2, 1, 1), **arguments):
    return torchvision.models.ResNet(
        block, list(layers), num_classes=CLASSES, **arguments
    )


def huggingface_model(kind=transformers.ResNetForImageClassification, **arguments):
    narrow = dict(
        embedding_size=8, hidden_sizes=[16, 32, 64], depths=[2, 1, 2], num_labels=7
    )
    return kind(transformers.ResNetConfig(**{**narrow, **arguments}))


MODELS = {
    "timm, bottleneck": timm_model,
    "timm, basic": functools.partial(timm_model, "resnet18"),
    # As wide as the stem: the first unit has no projection.
    "timm, basic, 64": functools.partial(
        timm_model, "resnet18", channels=(64, 128, 256, 512)
    ),
    "timm, groups": functools.partial(timm_model, cardinality=4, base_width=32),
    # Rounded down: 24 * 36 / 64 = 13.5.
    "timm, groups of a part": functools.partial(
        timm_model, channels=(24, 48, 96, 192), cardinality=2, base_width=36
    ),
    "timm, wide": functools.partial(timm_model, base_width=128),
    "timm, no head": functools.partial(timm_model, num_classes=0),
    "timm, gray": functools.partial(timm_model, in_chans=1),
    "torchvision, basic": functools.partial(torchvision_model, BasicBlock),
    "torchvision, bottleneck": torchvision_model,
    "torchvision, groups": functools.partial(
        torchvision_model, groups=32, width_per_group=4
    ),
    "torchvision, wide": functools.partial(torchvision_model, width_per_group=128),
    "huggingface, bottleneck": huggingface_model,
    "huggingface, basic": functools.partial(huggingface_model, layer_type="basic"),
    "huggingface, gray": functools.partial(huggingface_model, num_channels=1),
    "huggingface, no head": functools.partial(
        huggingface_model, transformers.ResNetModel
    ),
}
# Of each kind one at every size; what pads and strides is the same code.
EVERYWHERE = (
    "timm, groups",
    "timm, basic",
    "torchvision, groups",
    "huggingface, basic",
)
# What differs in the numbers of channels alone.
CHANNELS = (
    *("timm, basic, 64", "timm, wide", "timm, gray", "torchvision, wide"),
    "huggingface, gray",
)
CASES = few(MODELS, *(MODELS.keys() - set(CHANNELS)))
PAIRS = [
    pytest.param(case, size, marks=SLOW if size != "odd" or case in CHANNELS else ())
    for case in MODELS
    for size in IMAGES
    if size == "odd" or case in EVERYWHERE
]


@functools.cache
def their_model(case):
    return randomise(MODELS[case](), seed=1)


def weights_of(model, config=None, path="weights"):
    arrays = {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}
    if config is None and isinstance(model, transformers.PreTrainedModel):
        config = json.loads(model.config.to_json_string())
    return Weights(arrays=arrays, path=path, config=config or {})


@functools.cache
def imported(case):
    """Returns (format, architecture, variables) of one of MODELS."""
    weights = weights_of(their_model(case))
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    return form, architecture, formats.load(weights, form, architecture, EVEN)


def pixels(size, channels=3, seed=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, channels), np.uint8)


@functools.cache
def compiled(model):
    run = jax.jit(model.apply)
    return lambda variables, image: run(variables, image)


def our_outputs(model, variables, image):
    params, collections = state_lib.split_variables(variables)
    found = compiled(model)({"params": params, **collections}, image)
    return {name: np.asarray(value) for name, value in found.items()}


def their_outputs(model, scaled):
    """Returns pooled features and, if there is a head, logits."""
    x = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            body = getattr(model, "resnet", model)
            found = {"pooled": body(x).pooler_output[:, :, 0, 0]}
            if body is not model:
                found["logits"] = model(x).logits
        elif isinstance(model, torchvision.models.ResNet):
            kept = {}
            hook = model.avgpool.register_forward_hook(
                lambda module, inputs, output: kept.update(pooled=output[:, :, 0, 0])
            )
            found = {"logits": model(x), **kept}
            hook.remove()
        else:
            found = {"pooled": model.forward_features(x).mean((2, 3))}
            if model.num_classes:
                found["logits"] = model(x)
    return {name: value.numpy() for name, value in found.items()}


def worst(model, variables, theirs, size=EVEN):
    channels = variables["stem/kernel"].shape[2]
    if channels != 3:
        model = model.clone(mean=(127.5,), std=(127.5,))
    ours = our_outputs(model, variables, pixels(size, channels))
    expected = their_outputs(theirs, ours["image"])
    return max(relative_difference(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("case", "size"), PAIRS)
def test_weights_from_elsewhere_give_their_numbers_here(case, size):
    form, architecture, variables = imported(case)
    difference = worst(architecture.model, variables, their_model(case), IMAGES[size])
    print(f"{form.name}: {case}, {size}: {difference:.1e}")
    assert difference <= BOUND


@pytest.mark.parametrize("case", CASES)
def test_our_weights_give_our_numbers_there_and_come_back_bit_for_bit(case):
    form, architecture, variables = imported(case)
    model = architecture.model
    # Others than came in: nothing can be left over from there.
    rng = np.random.default_rng(3)
    ours = {name: _like(name, x, rng) for name, x in variables.items()}
    arrays = formats.write(form, model, EVEN, ours)
    theirs = MODELS[case]()
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    theirs.load_state_dict(state, strict=True)
    difference = worst(model, ours, theirs.eval())
    print(f"{form.name}: {case}: {difference:.1e}")
    assert difference <= BOUND
    config = weights_of(theirs).config
    back = Weights(arrays=arrays, path="back", config=config)
    found = form.architecture(back)
    assert found == architecture
    again = formats.load(back, form, found, EVEN)
    assert again.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def _like(name, array, rng):
    value = rng.normal(0, 1, array.shape) / np.sqrt(max(1, np.prod(array.shape[:-1])))
    if name.endswith(("variance", "scale")):
        value = rng.uniform(0.5, 1.5, array.shape)
    return value.astype(np.float32)


def test_running_statistics_are_imported_and_counters_are_not():
    _, _, variables = imported("timm, basic")
    their = their_model("timm, basic").state_dict()
    theirs, ours = "layer2.0.downsample.1", "batch_stats/stage_2/unit_01/norm_proj"
    for leaf, name in (("running_mean", "mean"), ("running_var", "variance")):
        np.testing.assert_array_equal(
            variables[f"{ours}/{name}"], their[f"{theirs}.{leaf}"].numpy()
        )
    assert not any("tracked" in name for name in variables)


# What each library builds from what `describe` says, ours to theirs.
EXPORTS = {
    ("timm", "R18"): ("resnet18", {}),
    ("timm", "R50"): ("resnet50", {}),
    ("timm", "X101_32x8d"): ("resnext101_32x8d", {}),
    ("timm", "W101_2"): ("wide_resnet101_2", {}),
    ("torchvision", "R34"): ("resnet34", {}),
    ("torchvision", "X101_64x4d"): ("resnet101", {"groups": 64, "width_per_group": 4}),
    ("torchvision", "W50_2"): ("resnet50", {"groups": 1, "width_per_group": 128}),
}


@pytest.mark.parametrize(("library", "size"), EXPORTS)
def test_published_sizes_are_described_by_their_names(library, size):
    model = ResNet.of(size, head=Classifier(num_classes=CLASSES))
    described = export.find(model, Library(library), EVEN).describe(model, EVEN, 3)
    name, arguments = described.values()
    assert (name, arguments) == (
        EXPORTS[library, size][0],
        {"num_classes": CLASSES, **EXPORTS[library, size][1]},
    )


@pytest.mark.parametrize("size", few(SIZES, "R18", "X50_32x4d", marks=PUBLISHED))
def test_published_sizes_have_the_parameters_of_timm_and_torchvision(size):
    head = Classifier(num_classes=1000)
    model = ResNet.of(size, head=head)
    count = sum(
        np.prod(shape, dtype=np.int64)
        for name, shape in formats.shapes(model, (224, 224), 3).items()
        if not name.startswith(trees.STATISTICS)
    )
    described = TIMM.describe(model, EVEN, 3)
    with torch.device("meta"):
        theirs = timm.create_model(described["architecture"], **described["model_args"])
        described = TORCHVISION.describe(model, EVEN, 3)
        other = getattr(torchvision.models, described["builder"])(
            **described["arguments"]
        )
    wanted = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert wanted == {name: tuple(x.shape) for name, x in other.state_dict().items()}
    assert count == sum(x.numel() for x in theirs.parameters())


@pytest.mark.parametrize(
    "size",
    few(["R18", "R50", "X50_32x4d", "W50_2", "X101_32x48d"], "R50", marks=PUBLISHED),
)
def test_flops_are_those_that_torch_counts(size):
    model = ResNet.of(size, head=Classifier(num_classes=1000))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jax.numpy.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    described = TIMM.describe(model, EVEN, 3)
    with torch.device("meta"), flop_counter.FlopCounterMode(display=False) as counter:
        theirs = timm.create_model(described["architecture"], **described["model_args"])
        theirs.eval()(torch.zeros(1, 3, 224, 224))
    found = flops.count(model.apply, variables, image)
    print(
        f"{size}: {found / 1e9:.3f} GFLOPs, torch {counter.get_total_flops() / 1e9:.3f}"
    )
    assert abs(found / counter.get_total_flops() - 1) < 0.001


NARROW = dict(stages=(1, 1, 1, 1), width=8, head=Classifier(num_classes=CLASSES))
FOLDERS = {
    "timm": ResNet(**NARROW, groups=2, width_per_group=64),
    "timm, basic": ResNet(**NARROW, block=Block.BASIC),
    "timm, published": ResNet.of("R18", head=None),
    "torchvision": ResNet.of("R18", head=Classifier(num_classes=CLASSES)),
    "huggingface": ResNet(**{**NARROW, "stages": (2, 1)}, stem_width=16),
    "huggingface, no head": ResNet(**{**NARROW, "head": None}, block=Block.BASIC),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_exported_folders_load_unchanged_and_are_read_back(case, tmp_path):
    model, library = FOLDERS[case], Library(case.partition(",")[0])
    rng = np.random.default_rng(5)
    variables = {
        name: _like(name, np.empty(shape, np.float32), rng)
        for name, shape in formats.shapes(model, EVEN, 3).items()
    }
    folder = tmp_path / "exported"
    exported = export.export(
        model,
        variables,
        preprocessing.from_torchvision((64, 64)),
        3,
        (),
        library,
        str(folder),
    )
    export.write(exported, folder)
    assert worst(model, variables, parity.load(exported, folder)) <= BOUND
    found = foreign.load(str(folder))
    assert found.format == exported.form.name
    fields = ("stages", "width", "stem_width", "block", "groups", "head")
    assert all(getattr(found.model, f) == getattr(model, f) for f in fields)
    assert found.variables.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(found.variables[name], array, err_msg=name)


@pytest.mark.parametrize("case", ["timm, groups", "huggingface, bottleneck"])
def test_every_unit_has_the_same_output_on_both_sides(case):
    form, architecture, variables = imported(case)
    model = architecture.model
    params, collections = state_lib.split_variables(variables)
    leaves = formats.shapes(model, EVEN, 3)
    pairs = parity.paired_modules(form.entries(model, EVEN, leaves))
    outputs, ours = parity.run_ours(
        model, {"params": params, **collections}, pixels(EVEN), [p[0] for p in pairs]
    )
    _, theirs = parity.run_theirs(
        their_model(case), outputs["image"], [p[1] for p in pairs]
    )
    compared = [pair for pair in pairs if pair[0] in ours and pair[1] in theirs]
    assert sum("/unit_" in mine for mine, _ in compared) > 3 * sum(model.stages)
    for mine, other in compared:
        moved = np.moveaxis(theirs[other], 1, -1)
        assert relative_difference(ours[mine], moved) <= BOUND, mine


def test_a_batch_in_training_gives_their_logits_and_running_statistics():
    _, architecture, variables = imported("timm, groups")
    model = architecture.model
    theirs = randomise(MODELS["timm, groups"](), seed=1).train()
    params, collections = state_lib.split_variables(variables)
    run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    ours, changed = run({"params": params, **collections}, pixels(IMAGES["odd"]))
    x = np.asarray(ours["image"]).transpose(0, 3, 1, 2).copy()
    logits = theirs(torch.from_numpy(x)).detach().numpy()
    difference = relative_difference(ours["logits"], logits)
    print(f"logits in training: {difference:.1e}")
    assert difference <= BOUND
    expected = {name: x.numpy() for name, x in theirs.named_buffers() if "run" in name}
    moved = {**variables, **trees.flatten(changed)}
    found = formats.write(TIMM, model, EVEN, moved)
    worst_of_all = max(
        relative_difference(found[name], x) for name, x in expected.items()
    )
    print(f"running statistics: {worst_of_all:.1e}")
    # One step with the momentum of the other library would be off by nearly all of it.
    assert worst_of_all <= 1e-6


# Traps: what would be wrong, and is seen.


def test_kernels_of_groups_in_another_order_are_seen():
    _, architecture, variables = imported("timm, groups")
    model = architecture.model
    name = "stage_1/unit_01/conv2/kernel"
    kernel = variables[name]
    # [3, 3, I / g, g * o]: the outputs of a group lie together.
    split = kernel.reshape(*kernel.shape[:3], model.groups, -1)
    mixed = variables | {name: split.swapaxes(3, 4).reshape(kernel.shape)}
    assert worst(model, mixed, their_model("timm, groups")) > 100 * BOUND


def test_padding_on_one_side_is_seen_at_even_sizes(monkeypatch):
    _, architecture, variables = imported("timm, basic")
    model = architecture.model.clone(last_scale=0.5)  # not the one compiled before
    convolve = jax.lax.conv_general_dilated

    def same(x, kernel, *, padding, **options):
        return convolve(x, kernel, padding="SAME", **options)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", same)
    theirs = their_model("timm, basic")
    assert worst(model, variables, theirs, IMAGES["even"]) > 100 * BOUND


def test_the_stride_on_the_first_convolution_is_another_model_and_refused():
    case = "huggingface, bottleneck"
    _, architecture, variables = imported(case)
    theirs = MODELS[case](downsample_in_bottleneck=True)
    theirs.load_state_dict(their_model(case).state_dict())
    assert worst(architecture.model, variables, theirs.eval()) > 100 * BOUND
    with pytest.raises(ValueError, match=r"downsample_in_bottleneck=True.*1\.5"):
        HF.architecture(weights_of(theirs))


def test_another_epsilon_of_the_norm_is_seen():
    _, architecture, variables = imported("timm, basic")
    theirs = randomise(MODELS["timm, basic"](), seed=1)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3  # keras and TensorFlow
    assert worst(architecture.model, variables, theirs) > 10 * BOUND


VARIANTS = {
    "resnet50d": "stem of three",
    "resnet50c": "stem of three",
    "resnetaa50": 'architecture "resnetaa50"',
    "resnetblur50": 'architecture "resnetblur50"',
    "seresnet50": "attention between channels",
    "ecaresnet50t": "stem of three",
    "skresnet18": "",
    "resnet50_gn": 'architecture "resnet50_gn"',
    "resnet26t": "stem of three",
    "resnetrs50": "stem of three",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_timm_are_refused_by_what_they_are(name):
    theirs = timm.create_model(name, num_classes=CLASSES)
    weights = weights_of(theirs, {"architecture": name}, path="file.safetensors")
    with pytest.raises(ValueError, match=f"file.safetensors.*{VARIANTS[name]}"):
        foreign.recognise(weights).architecture(weights)


def test_arguments_that_shapes_do_not_show_are_refused():
    weights = weights_of(their_model("timm, basic"))
    for arguments, message in (
        ({"output_stride": 8}, "output_stride=8"),
        ({"avg_down": True}, "avg_down=True"),
        ({"global_pool": "max"}, "global_pool=max"),
        ({"aa_layer": "avg"}, "aa_layer=avg"),
    ):
        config = {"architecture": "resnet18", "model_args": arguments}
        bad = Weights(arrays=weights.arrays, path="folder", config=config)
        with pytest.raises(ValueError, match=message):
            TIMM.architecture(bad)


def test_files_that_do_not_fit_are_refused_with_the_names():
    weights = weights_of(their_model("timm, basic"))
    arrays = dict(weights.arrays)
    arrays["layer1.0.bn1.extra"] = arrays.pop("layer1.0.bn1.bias")
    arrays["layer2.0.conv1.weight"] = arrays["layer2.0.conv1.weight"][:, :4]
    broken = Weights(arrays=arrays, path="file.pth")
    with pytest.raises(ValueError) as error:
        formats.load(broken, TIMM, TIMM.architecture(broken), EVEN)
    text = str(error.value)
    assert "file.pth" in text and "+ layer1.0.bn1.bias" in text
    assert "- layer1.0.bn1.extra" in text and "(3, 3, 4, 16)" in text
    arrays = {n: x for n, x in weights.arrays.items() if "layer1.1" not in n}
    arrays["layer1.2.conv1.weight"] = weights.arrays["layer1.0.conv1.weight"]
    gap = Weights(arrays=arrays, path="file.pth")
    with pytest.raises(ValueError, match=r"\+ layer1\.1\.conv1\.weight"):
        formats.load(gap, TIMM, TIMM.architecture(gap), EVEN)
    odd = timm_model("resnet18", channels=(8, 16, 24, 32))
    with pytest.raises(ValueError, match=r"\[8, 16, 24, 32\].*\[8, 16, 32, 64\]"):
        TIMM.architecture(weights_of(odd))
    without = Weights(
        arrays=weights_of(their_model("huggingface, basic")).arrays, path="a"
    )
    with pytest.raises(ValueError, match=r"config\.json"):
        HF.architecture(without)


@pytest.mark.parametrize(
    ("library", "fields", "message"),
    [
        ("timm", {"stem": Stem.SMALL}, "stem=large, this model stem=small.*7x7"),
        ("timm", {"stem_width": 32}, "stem_width=64, this model stem_width=32"),
        ("timm", {"stages": (1, 1)}, "4 stages"),
        ("timm", {"head": Classifier(num_classes=3, hidden_dim=4)}, "hidden_dim=4"),
        ("torchvision", {}, r"stages=\(1, 1, 1, 1\)"),
        ("torchvision", {"head": None}, "head=Classifier, this model head=none"),
        ("huggingface", {"groups": 2}, "groups=2.*--to timm"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_a_sentence(library, fields, message):
    model = ResNet(**{**NARROW, **fields})
    with pytest.raises(ValueError, match=message):
        export.find(model, Library(library), EVEN)


@pytest.mark.slow
@pytest.mark.published
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_published_sizes_give_the_same_numbers_at_224(name):
    theirs = randomise(timm.create_model(name), seed=4)
    weights = weights_of(theirs, {"architecture": name})
    architecture = TIMM.architecture(weights)
    variables = formats.load(weights, TIMM, architecture, (224, 224))
    difference = worst(architecture.model, variables, theirs, (224, 224))
    print(f"{name}: {difference:.1e}")
    assert difference <= BOUND
