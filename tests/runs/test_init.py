import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from outside.self_distillation import Student
from tiers import crossed

from big_vision_lite import trees
from big_vision_lite.config import Checkpoints, Init, PositionResize
from big_vision_lite.conversion.input_range import (
    SYMMETRIC,
    InputRange,
    fold_input_range,
)
from big_vision_lite.models import vit_variants
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.bit_v1 import BiTV1, Trunk
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.models.vit_variants import hybrid
from big_vision_lite.runs import init, integrity, load
from big_vision_lite.runs.checkpoint import Checkpointer
from big_vision_lite.runs.integrity import DamagedCheckpoint
from big_vision_lite.training.state import TrainState

RNG = np.random.default_rng(0)


def params(classes=10, grid=4, width=8):
    def array(*shape):
        return RNG.normal(size=shape).astype(np.float32)

    return {
        "encoder/block_00/kernel": array(width, width),
        "encoder/block_00/bias": array(width),
        "position_embedding": array(grid, grid, width),
        "head/kernel": array(width, classes),
        "head/bias": array(classes),
    }


# Says which of the names above hold positions, patches and a head.
PLAIN = ViT.of("Ti/16", head=Classifier(num_classes=10))


def start_from(loaded, fresh, same_classes=True, model=PLAIN, **fields):
    lines = []
    fresh = {name: jnp.asarray(leaf) for name, leaf in fresh.items()}
    found = init.adapt(
        loaded,
        fresh,
        Init(path="runs/x", **fields),
        model=model,
        same_classes=same_classes,
        log=lines.append,
    )
    assert list(found) == list(fresh)
    for name, leaf in fresh.items():
        assert found[name].shape == leaf.shape and found[name].dtype == leaf.dtype
    return found, lines


def assert_from(found, source, names):
    for name in names:
        np.testing.assert_array_equal(found[name], source[name], name)


def test_everything_that_fits_is_taken_and_nothing_is_said():
    loaded, fresh = params(), params()
    found, lines = start_from(loaded, fresh)
    assert_from(found, loaded, loaded)
    assert lines == []


def test_what_is_dropped_stays_fresh_and_is_named():
    loaded, fresh = params(), params()
    found, lines = start_from(loaded, fresh, drop="encoder/.*|head/bias")
    dropped = ["encoder/block_00/bias", "encoder/block_00/kernel", "head/bias"]
    assert_from(found, fresh, dropped)
    assert_from(found, loaded, set(loaded) - set(dropped))
    assert lines == [f"init: {n} starts from scratch (init.drop)" for n in dropped]
    with pytest.raises(ValueError, match='init.drop "hed/.*" matches no name'):
        start_from(loaded, fresh, drop="hed/.*")


def test_drop_takes_what_only_one_side_has():
    loaded, fresh = params(), params()
    loaded["decoder/kernel"] = np.ones((2, 2), np.float32)
    fresh["neck/kernel"] = np.zeros((3, 3), np.float32)
    found, _ = start_from(loaded, fresh, drop="(decoder|neck)/.*")
    assert "decoder/kernel" not in found
    assert_from(found, fresh, ["neck/kernel"])


def test_names_are_rewritten_before_they_are_compared():
    fresh = params()
    loaded = {f"backbone/{n}".replace("block_00", "b0"): x for n, x in params().items()}
    found, _ = start_from(
        loaded, fresh, rename=("^backbone/=>", r"/b(\d)/=>/block_0\1/")
    )
    for name in fresh:
        old = f"backbone/{name}".replace("block_00", "b0")
        np.testing.assert_array_equal(found[name], loaded[old])
    with pytest.raises(ValueError, match='init.rename: "a->b" is not of the form'):
        Init(path="x", rename=("a->b",))


def test_two_names_that_become_one_are_refused():
    fresh, loaded = params(), params()
    loaded["head/weight"] = loaded["head/kernel"]
    with pytest.raises(ValueError, match="init.rename.*both become.*head/kernel"):
        start_from(loaded, fresh, rename=("weight=>kernel",))


def antialiased(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of a triangle with half-pixel centres, by its formula."""
    scale = max(1.0, old / new)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(old):
            weights[i, j] = max(0.0, 1 - abs(j - centre) / scale)
        weights[i] /= weights[i].sum()
    return weights


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (3, 12), (37, 16)])
def test_positions_are_resampled_to_the_grid_of_the_model(old, new):
    loaded, fresh = params(grid=old), params(grid=new)
    found, lines = start_from(loaded, fresh)
    grid = loaded["position_embedding"]
    w = antialiased(old, new)
    expected = np.einsum("ri,cj,ijd->rcd", w, w, grid)
    np.testing.assert_allclose(found["position_embedding"], expected, atol=1e-5)
    assert_from(found, loaded, set(loaded) - {"position_embedding"})
    assert lines == [
        f"Checkpoint grid {old}x{old}, model grid {new}x{new}: resizing position "
        "embedding (bilinear). --config.init.position_resize=error to forbid."
    ]


def test_resampled_positions_keep_their_place_in_the_image():
    # A ramp along the columns stays one, constant along the rows.
    loaded, fresh = params(grid=8), params(grid=4)
    ramp = np.broadcast_to(np.arange(8.0)[None, :, None], (8, 8, 8))
    loaded["position_embedding"] = ramp.astype(np.float32)
    found, _ = start_from(loaded, fresh)
    grid = np.asarray(found["position_embedding"])
    assert np.ptp(grid, axis=0).max() < 1e-5
    np.testing.assert_allclose(grid[0, 1:3, 0], [2.5, 4.5], atol=1e-5)


def test_the_embedding_of_a_real_vit_moves_to_another_image_size():
    def weights(side, patch=2):
        model = ViT(
            width=16,
            depth=1,
            mlp_dim=16,
            num_heads=2,
            patch_size=patch,
            positions=Positions.LEARNED,
            head=Classifier(num_classes=3),
        )
        image = jax.ShapeDtypeStruct((1, side, side, 1), jnp.uint8)
        shapes = jax.eval_shape(
            lambda key, image: model.init(key, image=image), jax.random.key(0), image
        )
        rng = np.random.default_rng(side)
        return {
            n: rng.normal(size=x.shape).astype(np.float32)
            for n, x in trees.flatten(shapes["params"]).items()
        }

    loaded, fresh = weights(8), weights(12)
    found, lines = start_from(loaded, fresh)
    assert lines[0].startswith("Checkpoint grid 4x4, model grid 6x6: resizing")
    (name,) = [n for n in fresh if n in ViT.position_embeddings]
    assert fresh[name].shape != loaded[name].shape
    assert_from(found, loaded, set(loaded) - {name})


def test_resizing_positions_can_be_forbidden():
    with pytest.raises(
        ValueError, match="Checkpoint grid 4x4, model grid 5x5.*Refused"
    ):
        start_from(params(grid=4), params(grid=5), position_resize=PositionResize.ERROR)
    same, lines = start_from(params(), params(), position_resize=PositionResize.ERROR)
    assert lines == []


def test_grids_that_are_no_squares_are_resampled_side_by_side():
    # As many patches, in another shape: nothing may be copied as it is.
    loaded, fresh = params(), params(grid=4)
    loaded["position_embedding"] = RNG.normal(size=(2, 8, 8)).astype(np.float32)
    found, lines = start_from(loaded, fresh)
    rows, columns = antialiased(2, 4), antialiased(8, 4)
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, loaded["position_embedding"])
    np.testing.assert_allclose(found["position_embedding"], expected, atol=1e-5)
    assert lines[0].startswith("Checkpoint grid 2x8, model grid 4x4: resizing")


def test_positions_of_another_width_are_a_difference_like_any_other():
    with pytest.raises(ValueError) as caught:
        start_from(params(width=8), params(width=16, grid=5), drop="head/.*")
    assert "+ position_embedding (5, 5, 16) float32  in the model" in str(caught.value)


def test_a_head_for_other_classes_is_new():
    loaded, fresh = params(classes=1000), params(classes=100)
    found, lines = start_from(loaded, fresh, same_classes=False)
    assert_from(found, fresh, ["head/kernel", "head/bias"])
    assert_from(found, loaded, ["encoder/block_00/kernel", "position_embedding"])
    assert lines == [
        "Head has 1000 classes, data 100: new head (zero init). "
        'To refuse instead: --config.init.drop=""'
    ]
    # As many classes, but others.
    found, lines = start_from(params(), fresh := params(), same_classes=False)
    assert_from(found, fresh, ["head/kernel", "head/bias"])
    assert "Head has 10 classes, data 10 with other names: new head" in lines[0]


def test_a_head_for_the_same_classes_is_kept():
    loaded, fresh = params(), params()
    found, lines = start_from(loaded, fresh, same_classes=True)
    assert_from(found, loaded, ["head/kernel", "head/bias"])
    assert lines == []
    # Kept against other class names when asked for.
    found, lines = start_from(loaded, fresh, same_classes=False, drop="")
    assert_from(found, loaded, ["head/kernel", "head/bias"])
    assert lines == []


def test_a_backbone_without_head_gets_one_and_a_head_can_be_left_behind():
    headless = {n: x for n, x in params().items() if not n.startswith("head/")}
    fresh = params()
    found, lines = start_from(headless, fresh)
    assert_from(found, fresh, ["head/kernel", "head/bias"])
    assert "Head has no classes, data 10: new head" in lines[0]
    found, lines = start_from(params(), headless)
    assert set(found) == set(headless)
    assert lines[0] == "Head has 10 classes, the model no head: left out."


def test_a_head_of_another_shape_is_refused_if_nothing_may_be_dropped():
    with pytest.raises(ValueError) as caught:
        start_from(params(classes=1000), params(classes=100), drop="")
    message = str(caught.value)
    for line in (
        "init.path=runs/x and the model differ:",
        "  + head/kernel (8, 100) float32  in the model",
        "  - head/kernel (8, 1000) float32  in the checkpoint",
        "  + head/bias (100,) float32  in the model",
        "--config.init.drop='head/.*'",
    ):
        assert line in message, message


def test_all_differences_are_listed_at_once():
    loaded, fresh = params(), params()
    loaded["fc/kernel"] = np.ones((3, 3), np.float32)
    fresh["neck/kernel"] = np.ones((4, 4), np.float32)
    del loaded["encoder/block_00/bias"]
    with pytest.raises(ValueError) as caught:
        start_from(loaded, fresh)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  + encoder/block_00/bias (8,) float32  only in the model",
        "  - fc/kernel (3, 3) float32  only in the checkpoint",
        "  + neck/kernel (4, 4) float32  only in the model",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    loaded = params()
    loaded["encoder/block_00/kernel"][3, 4] = value
    with pytest.raises(ValueError, match="block_00/kernel holds NaN or infinity"):
        start_from(loaded, params())
    # Not if they are left behind.
    start_from(loaded, params(), drop="encoder/.*")


def test_another_dtype_becomes_the_models():
    loaded = {n: x.astype(jnp.bfloat16) for n, x in params().items()}
    found, _ = start_from(loaded, params())
    np.testing.assert_array_equal(
        found["head/kernel"], np.asarray(loaded["head/kernel"], np.float32)
    )


def nested(values):
    return jax.tree.map(jnp.asarray, trees.unflatten(values))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step folders of one run without and one with an average."""
    folders = {}
    for average in (False, True):
        weights, averaged = params(), params()
        state = TrainState(
            step=jnp.int32(3),
            params=nested({n: x for n, x in weights.items() if "encoder" not in n}),
            frozen=nested({n: x for n, x in weights.items() if "encoder" in n}),
            collections={},
            opt_state={"mu": nested(params())},
            ema=nested({n: x for n, x in averaged.items() if "encoder" not in n})
            if average
            else None,
        )
        workdir = epath.Path(tmp_path_factory.mktemp(f"average_{average}"))
        with Checkpointer(
            workdir,
            Checkpoints(),
            config_text="{}",
            metadata={"class_names": ["a"]},
            log=lambda line: None,
        ) as checkpointer:
            checkpointer.save(3, state)
        frozen = {n: x for n, x in weights.items() if "encoder" in n}
        expected = (averaged if average else weights) | frozen
        folders[average] = workdir / "checkpoints" / "3", expected
    return folders


@pytest.mark.parametrize("average", [False, True])
def test_the_average_is_loaded_when_there_is_one_with_the_frozen_rest(average, saved):
    folder, expected = saved[average]
    loaded, manifest = load.load_variables(folder)
    assert set(loaded) == set(expected)
    assert_from(loaded, expected, expected)
    assert manifest["class_names"] == ["a"] and manifest["step"] == 3
    found, lines = start_from(loaded, params())
    assert_from(found, expected, expected)
    assert lines == []


def test_a_damaged_folder_is_not_started_from(saved, tmp_path):
    folder, _ = saved[True]
    copy = epath.Path(tmp_path / "3")
    shutil.copytree(folder, copy)
    manifest = integrity.read_manifest(copy)
    manifest["leaves"]["ema/head/bias"]["checksum"] = "00000000"
    integrity.write_manifest(copy, manifest)
    with pytest.raises(DamagedCheckpoint, match="3: ema/head/bias differ from what"):
        load.load_variables(copy)
    (copy / "config.json").write_text("{} ")
    with pytest.raises(DamagedCheckpoint, match="3/config.json has 3 bytes, 2 were"):
        load.load_variables(copy)


def test_init_holds_only_what_flags_can_set():
    kinds = {f.name: f.type for f in dataclasses.fields(Init)}
    assert list(kinds) == [
        *("path", "into", "part", "drop", "rename", "position_resize", "match_classes")
    ]


def test_a_distilled_model_gets_two_new_heads():
    def distilled(classes):
        made = params(classes=classes)
        return made | {f"distillation_{n}": x for n, x in made.items() if "head" in n}

    loaded, fresh = distilled(1000), distilled(3)
    found, _ = start_from(loaded, fresh, same_classes=False)
    heads = [name for name in fresh if "head/" in name]
    assert len(heads) == 4
    assert_from(found, fresh, heads)


def stem(channels, patch=4, width=6):
    return RNG.normal(size=(patch, patch, channels, width)).astype(np.float32)


def tokens(kernel, image):
    return np.einsum("hwcd,hwc->d", kernel, image)


FAMILIES = {
    "ViT": (
        ViT(width=16, depth=1, mlp_dim=8, num_heads=2, patch_size=8),
        "patch_embedding",
    ),
    "MlpMixer": (
        MlpMixer(width=16, depth=1, token_mlp_dim=4, channel_mlp_dim=4, patch_size=8),
        "patch_embedding",
    ),
    "ResNet": (ResNet(stages=(1,), width=8, stem_width=16), "stem"),
    "BiT": (BiT.of("small"), "stem"),
    "BiTV1": (BiTV1(trunk=Trunk(stages=(1,), width=32)), "conv_root"),
    "hybrid": (
        hybrid(
            "R+Ti/16", width=12, depth=1, num_heads=2, stem=Trunk(stages=(), width=32)
        ),
        "conv_root",
    ),
}
STANDARDISED = ("BiT", "BiTV1", "hybrid")


def random_variables(model, image):
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return {
        collection: jax.tree.map(
            lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype), leaves
        )
        for collection, leaves in shapes.items()
        if collection in ("params", "batch_stats")
    }


def stem_output(model, module, variables, image):
    """What the first convolution gives, the only one that sees channels."""

    @jax.jit
    def run(variables, image):
        _, seen = model.apply(
            variables,
            image=image,
            mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name == module,
        )
        return seen

    (output,) = jax.tree.leaves(run(variables, image))
    return np.asarray(output)


def noise(channels, size=32):
    return RNG.integers(0, 256, (2, size, size, channels), np.uint8)


def repeated(images, channels):
    return jnp.asarray(images[..., np.arange(channels) % images.shape[-1]])


@pytest.mark.parametrize(
    ("family", "channels"),
    crossed(FAMILIES, [(3, 1), (3, 2), (3, 4), (3, 13), (4, 3), (13, 3)]),
)
def test_stems_for_other_channels_see_missing_ones_as_repeated(family, channels):
    old, new = channels
    model, module = FAMILIES[family]
    # Standardised weights are others; only gray ones, up to a factor, are the same.
    images = noise(1 if family in STANDARDISED else min(old, new))
    before, after = repeated(images, old), repeated(images, new)
    loaded, fresh = (random_variables(model, image) for image in (before, after))
    flat = trees.flatten(loaded["params"])
    found, lines = start_from(flat, trees.flatten(fresh["params"]), model=model)
    adapted = loaded | {"params": trees.unflatten(found)}
    expected = stem_output(model, module, loaded, before)
    got = stem_output(model, module, adapted, after)
    name = model.input_kernel
    assert name.endswith(f"{module}/kernel")
    assert_from(found, flat, set(flat) - {name})
    if family in STANDARDISED:
        factor = (got * expected).sum((0, 1, 2)) / np.square(expected).sum((0, 1, 2))
        assert factor.min() > 0.1
        expected = factor * expected
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    (line,) = lines
    assert line.startswith(f"init: {name} for {old} channels, images have {new}: ")
    assert ("BiT standardises" in line) == (family in STANDARDISED)


def test_fewer_channels_get_the_sum_of_those_that_are_left_out_and_say_so():
    name = "patch_embedding/kernel"
    four = stem(4)
    r, g, b, infrared = np.moveaxis(four, 2, 0)
    for channels, expected, said in (
        (
            3,
            (r + infrared, g, b),
            "summed in turn, channel c to c % 3, so that ",
        ),
        (2, (r + b, g + infrared), "summed in turn, channel c to c % 2, so that "),
        (1, (r + g + b + infrared,), "summed, so that gray images give what they gave"),
    ):
        found, (line,) = start_from({name: four}, {name: stem(channels)})
        np.testing.assert_allclose(found[name], np.stack(expected, 2), atol=1e-6)
        assert f"for 4 channels, images have {channels}: weights {said}" in line
        assert "repeated and scaled" not in line


def test_more_channels_share_the_weights_and_give_them_back():
    name = "patch_embedding/kernel"
    three = stem(3)
    r, g, b = np.moveaxis(three, 2, 0)
    found, (line,) = start_from({name: three}, {name: stem(4)})
    np.testing.assert_allclose(found[name], np.stack((r / 2, g, b, r / 2), 2))
    assert "weights repeated in turn and divided by how often" in line
    back, _ = start_from({name: np.asarray(found[name])}, {name: three})
    np.testing.assert_allclose(back[name], three, atol=1e-6)


def test_patches_of_another_size_give_the_tokens_of_resized_patches():
    name = "patch_embedding/kernel"
    loaded, fresh = {name: stem(3, patch=4)}, {name: stem(3, patch=8)}
    found, lines = start_from(loaded, fresh)
    small = RNG.normal(size=(4, 4, 3))
    large = np.stack(
        [patches.bilinear(4, 8) @ c @ patches.bilinear(4, 8).T for c in small.T], -1
    )
    np.testing.assert_allclose(
        tokens(np.asarray(found[name]), large.transpose(1, 0, 2)),
        tokens(loaded[name], small),
        atol=1e-4,
    )
    assert "patches of 4 px, the model has 8" in lines[0]
    assert "not exact" not in lines[0]
    _, lines = start_from(fresh, loaded)
    assert "Shrinking is not exact" in lines[0]


def vit(**fields):
    return ViT.of("Ti/16", **{"width": 16, "num_heads": 2, **fields})


def test_weights_for_another_range_of_pixels_are_folded_into_the_patches():
    images = jnp.asarray(RNG.integers(0, 256, (2, 32, 32, 3), np.uint8))
    theirs = vit(depth=1, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    ours = vit(depth=1)
    variables = jax.jit(theirs.init)(jax.random.key(0), image=images)
    given = load.Loaded(variables=trees.flatten(variables["params"]), model=theirs)
    lines = []
    moved = init.scaled_like(given, ours, given.variables, lines.append)
    params = trees.unflatten(moved.variables)
    expected = theirs.apply(variables, image=images)["pooled"]
    found = ours.apply({"params": params}, image=images)["pooled"]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    wrong = ours.apply(variables, image=images)["pooled"]
    assert np.abs(wrong - expected).max() > 1e-2
    assert "folded into the patch embedding" in lines[0]
    assert init.model_differences(ours, moved.model) == []


IMAGENET = {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}


def started(loaded, model, fresh):
    """The variables for `model` as start.py makes them, and what was said."""
    lines = []
    moved = init.scaled_like(loaded, model, fresh, lines.append)
    lines += init.model_differences(model, moved.model)
    found, more = start_from(moved.variables, fresh, model=model)
    return {"params": trees.unflatten(found)}, lines + more


@pytest.mark.parametrize(
    ("family", "channels"), crossed(["ViT", "MlpMixer"], [1, 2, 4, 13])
)
@pytest.mark.parametrize("back", [False, True], ids=["from_imagenet", "to_imagenet"])
def test_another_range_and_other_channels_at_once_are_exact(family, channels, back):
    ranges = [
        dict(mean=(127.5,), std=(127.5,))
        if channels == 1
        else dict(
            mean=tuple(np.linspace(30.0, 200.0, channels).tolist()),
            std=tuple(np.linspace(90.0, 20.0, channels).tolist()),
        ),
        IMAGENET,
    ]
    counts = [channels, 3]
    if not back:
        ranges, counts = ranges[::-1], counts[::-1]
    theirs, ours = (FAMILIES[family][0].clone(**fields) for fields in ranges)
    images = noise(min(counts))
    before, after = (repeated(images, count) for count in counts)
    variables, fresh = (
        random_variables(*pair) for pair in ((theirs, before), (ours, after))
    )
    given = load.Loaded(variables=trees.flatten(variables["params"]), model=theirs)
    found, lines = started(given, ours, trees.flatten(fresh["params"]))
    expected = stem_output(theirs, "patch_embedding", variables, before)
    got = stem_output(ours, "patch_embedding", found, after)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    ranged, resized = lines
    assert f"with mean {theirs.mean}" in ranged and f"now with {ours.mean}" in ranged
    assert "folded into the patch embedding, exactly" in ranged
    assert f"for {counts[0]} channels, images have {counts[1]}: weights " in resized


@pytest.mark.parametrize("stored", [None, 16])
@pytest.mark.parametrize("patch", [4, 6, 8, 12])
def test_another_range_is_exact_at_the_patch_size_of_the_model(patch, stored):
    # A kernel that shrinks loses weights that bilinear sampling does not read, and so
    # a part of its sum.
    theirs = vit(depth=1, patch_size=16, **IMAGENET)
    ours = vit(depth=1, patch_size=patch, kernel_patch_size=stored)
    images = jnp.asarray(noise(3, size=48))
    variables, fresh = (random_variables(model, images) for model in (theirs, ours))
    given = load.Loaded(variables=trees.flatten(variables["params"]), model=theirs)
    found, _ = started(given, ours, trees.flatten(fresh["params"]))
    same_range = ours.clone(kernel_patch_size=16, **IMAGENET)
    expected = stem_output(same_range, "patch_embedding", variables, images)
    got = stem_output(ours, "patch_embedding", found, images)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["ResNet", "BiT", "BiTV1", "hybrid"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_padded_stems_keep_their_range_and_say_what_to_set(family, channels):
    theirs = FAMILIES[family][0].clone(**IMAGENET)
    ours = FAMILIES[family][0]
    variables = trees.flatten(random_variables(theirs, noise(3))["params"])
    fresh = trees.flatten(random_variables(ours, noise(channels))["params"])
    given = load.Loaded(variables=variables, model=theirs)
    lines = []
    kept = init.scaled_like(given, ours, fresh, lines.append)
    assert kept.variables is variables
    said = init.model_differences(ours, kept.model)
    if channels == 3:
        assert lines == [] and "--config.model.mean=(123.7, 116.3, 103.5)" in said[0]
    else:
        # Three means would be refused by a model of other channels.
        (line,) = lines
        assert said == []
        assert "of 3 channels, this recipe has mean=(127.5,) and std" in line
        assert "the stem pads with zeros, which are another gray in each range" in line
        assert "'--config.model.mean=(114.5,)' '--config.model.std=(57.633,)'" in line


def test_a_range_for_other_channels_than_the_kernel_is_refused_in_words():
    imagenet = InputRange(**IMAGENET)
    for ranges in ((imagenet, SYMMETRIC), (SYMMETRIC, imagenet)):
        with pytest.raises(ValueError, match="has 3 values, .* kernel of 4 channels"):
            fold_input_range(stem(4), np.zeros(6, np.float32), *ranges)


def test_what_a_flexivit_stores_and_was_resized_is_no_difference():
    theirs = vit_variants.flexivit("Ti/16", width=16, num_heads=2, mlp_dim=8, depth=1)
    ours = theirs.clone(kernel_patch_size=None, position_grid=())
    images = jnp.asarray(noise(3, size=64))
    variables, fresh = (random_variables(model, images) for model in (theirs, ours))
    given = load.Loaded(variables=trees.flatten(variables["params"]), model=theirs)
    found, lines = started(given, ours, trees.flatten(fresh["params"]))
    kernel, positions = lines
    assert "for patches of 32 px, the model has 16" in kernel
    assert "Checkpoint grid 7x7, model grid 4x4" in positions
    expected = jax.jit(theirs.apply)(variables, images)["pooled"]
    got = jax.jit(ours.apply)(found, images)["pooled"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_changes_the_features_of_the_same_weights_is_said():
    ours, theirs = vit(), vit(norm_epsilon=1e-12, head=Classifier(num_classes=3))
    (line,) = init.model_differences(ours, theirs)
    assert "norm_epsilon=1e-12, this recipe has 1e-06" in line
    assert "--config.model.norm_epsilon=1e-12" in line
    assert init.model_differences(ours, object()) == []


def test_where_parameters_start_that_the_weights_bring_is_no_difference():
    ours, theirs = vit(depth=1, layer_scale=1e-6), vit(depth=1, layer_scale=1e-5)
    assert init.model_differences(ours, theirs) == []
    image = jnp.asarray(RNG.integers(0, 256, (2, 32, 32, 3), np.uint8))
    variables = jax.jit(theirs.init)(jax.random.key(0), image)
    found, expected = (
        jax.jit(model.apply)(variables, image) for model in (ours, theirs)
    )
    np.testing.assert_array_equal(found["pooled"], expected["pooled"])
    # Without any there are other names, which are listed.
    scaled = trees.flatten(variables["params"])
    plain = {name: x for name, x in scaled.items() if not name.endswith("_scale")}
    assert len(plain) == len(scaled) - 2
    with pytest.raises(ValueError, match="- encoder/block_00/attention_scale"):
        start_from(scaled, plain)
    last = [ResNet(stages=(1,), width=4, last_scale=scale) for scale in (0.0, 1.0)]
    assert init.model_differences(*last) == []


def test_a_wrapped_backbone_is_started_from_as_it_would_be_alone():
    """Another grid, range of pixels and head: between two wrappers of one class."""

    def student(side, classes, **fields):
        encoder = ViT(
            **dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4),
            positions=Positions.LEARNED,
            head=Classifier(num_classes=classes),
            **fields,
        )
        model, image = Student(encoder=encoder), jnp.asarray(noise(3, size=side))
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        flat = trees.flatten(shapes["params"])
        drawn = {
            n: RNG.normal(size=x.shape).astype(np.float32) for n, x in flat.items()
        }
        return model, drawn

    theirs, loaded = student(16, 5, **IMAGENET)
    ours, fresh = student(32, 5)
    lines = []
    found = init.start_from(
        load.Loaded(
            variables=loaded,
            class_names=("b",) * 5,
            model=theirs,
            part="encoder",
            backbone=theirs.encoder,
        ),
        Init(path="runs/x"),
        ours,
        ("a",) * 5,
        {name: jnp.asarray(leaf) for name, leaf in fresh.items()},
        lines.append,
    )
    said = " ".join(lines)
    assert "folded into the patch embedding, exactly" in said
    assert "Checkpoint grid 4x4, model grid 8x8: resizing position" in said
    assert "with other names: new head" in said and "the features will" not in said
    heads = [name for name in fresh if "head/" in name]
    assert len(heads) == 2
    assert_from(found, fresh, heads)
    taken = [n for n in fresh if n.startswith(("projector", "encoder/encoder/"))]
    assert_from(found, loaded, taken)
