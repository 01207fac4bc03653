"""What is special about the ResNets of timm, torchvision and Hugging Face."""

import functools

import jax
import numpy as np
import pytest
import torch_libraries
from conversion_cases.case import CLASSES, EVEN, ODD
from conversion_cases.resnet import huggingface_resnet, timm_resnet
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, few

from big_vision_lite import trees
from big_vision_lite.conversion import export, foreign, formats
from big_vision_lite.conversion.families import resnet
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import SIZES, ResNet
from big_vision_lite.runtime import flops
from big_vision_lite.training import state as state_lib

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("transformers")
import both_sides  # noqa: E402
from both_sides import BOUND, pixels, weights_of, worst  # noqa: E402
from torch.utils import flop_counter  # noqa: E402

pytestmark = pytest.mark.parity

HF, HF_BODY, TIMM, TORCHVISION = resnet.FORMATS


@functools.cache
def imported(case):
    return both_sides.imported(case, None, EVEN)


def test_running_statistics_are_imported_and_counters_are_not():
    found = imported("timm ResNet, basic")
    variables, their = found.variables, found.theirs.state_dict()
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


def test_a_batch_in_training_gives_their_logits_and_running_statistics():
    found = both_sides.imported("timm ResNet, groups", None, EVEN)
    model, variables, theirs = found.model, found.variables, found.theirs.train()
    params, collections = state_lib.split_variables(variables)
    run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    ours, changed = run({"params": params, **collections}, pixels(ODD))
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
    found = imported("timm ResNet, groups")
    model, variables = found.model, found.variables
    name = "stage_1/unit_01/conv2/kernel"
    kernel = variables[name]
    # [3, 3, I / g, g * o]: the outputs of a group lie together.
    split = kernel.reshape(*kernel.shape[:3], model.groups, -1)
    mixed = variables | {name: split.swapaxes(3, 4).reshape(kernel.shape)}
    assert worst(model, mixed, found.theirs) > 100 * BOUND


def test_padding_on_one_side_is_seen_at_even_sizes(monkeypatch):
    found = imported("timm ResNet, basic")
    model = found.model.clone(last_scale=0.5)  # not the one compiled before
    convolve = jax.lax.conv_general_dilated

    def same(x, kernel, *, padding, **options):
        return convolve(x, kernel, padding="SAME", **options)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", same)
    assert worst(model, found.variables, found.theirs, EVEN) > 100 * BOUND


def test_the_stride_on_the_first_convolution_is_another_model_and_refused(tmp_path):
    found = both_sides.imported("HF ResNet, bottleneck", tmp_path, EVEN)
    theirs = huggingface_resnet(downsample_in_bottleneck=True)
    theirs.load_state_dict(found.theirs.state_dict())
    assert worst(found.model, found.variables, theirs.eval()) > 100 * BOUND
    with pytest.raises(ValueError, match=r"downsample_in_bottleneck=True.*1\.5"):
        HF.architecture(weights_of(theirs))


def test_another_epsilon_of_the_norm_is_seen():
    found = both_sides.imported("timm ResNet, basic", None, EVEN)
    theirs = found.theirs
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3  # keras and TensorFlow
    assert worst(found.model, found.variables, theirs) > 10 * BOUND


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
    weights = weights_of(timm_resnet("resnet18"))
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
    weights = weights_of(timm_resnet("resnet18"))
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
    odd = timm_resnet("resnet18", channels=(8, 16, 24, 32))
    with pytest.raises(ValueError, match=r"\[8, 16, 24, 32\].*\[8, 16, 32, 64\]"):
        TIMM.architecture(weights_of(odd))
    without = Weights(arrays=weights_of(huggingface_resnet()).arrays, path="a")
    with pytest.raises(ValueError, match=r"config\.json"):
        HF.architecture(without)


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
