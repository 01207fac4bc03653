"""ResNet with batch norm: shapes, statistics in training, on devices, over a resume."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiers import few
from tiny_runs import gradients, rows, start

from big_vision_lite import train, trees
from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.models.bit import Block, Stem
from big_vision_lite.models.blocks.batch_norm import BatchNorm, Statistics
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype, Remat
from big_vision_lite.models.resnet import SIZES, ResNet
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.schedules import Average, Constant
from big_vision_lite.training.optimizers import AdamW


def tiny(**overrides):
    """For images of 8 px."""
    fields = dict(
        stages=(1, 1),
        width=8,
        stem_width=8,
        stem=Stem.SMALL,
        groups=2,
        head=Classifier(num_classes=10),
    )
    return ResNet(**{**fields, **overrides})


def random_variables(model, image, seed=0):
    """Variables in general position: no zero scale or head, statistics that moved."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        value = rng.normal(0, 0.3, leaf.shape)
        if name.endswith(("scale", "variance")):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(value, jnp.float32)

    return trees.map_named(draw, jax.eval_shape(model.init, jax.random.key(0), image))


def images(batch=4, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (batch, side, side, 3), np.uint8))


def trained(model, variables, image):
    """Returns (outputs, statistics) of a forward pass in training."""
    run = jax.jit(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
    )
    outputs, changed = run(variables, image)
    return outputs, changed["batch_stats"]


@pytest.mark.parametrize("size", few(SIZES, "R18", "R50", "X50_32x4d", "W50_2"))
def test_published_sizes_have_the_shapes_of_the_contract(size):
    model = ResNet.of(size, head=Classifier(num_classes=1000))
    image = jax.ShapeDtypeStruct((2, 224, 256, 3), jnp.uint8)
    found = jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
    width = 512 if size in ("R18", "R34") else 2048
    assert {name: x.shape for name, x in found.items()} == {
        "image": (2, 224, 256, 3),
        "grid": (2, 7, 8, width),
        "pooled": (2, width),
        "logits": (2, 1000),
    }


def test_inner_channels_are_those_of_the_papers():
    for size, channels in {
        "R50": (64, 512),
        "X50_32x4d": (128, 1024),
        "X101_32x48d": (1536, 12288),
        "W50_2": (128, 1024),
    }.items():
        model = ResNet.of(size)
        assert (model.inner(0), model.inner(3)) == channels


def test_unknown_sizes_and_impossible_fields_are_refused():
    with pytest.raises(ValueError, match=r'called "50"; use one of R18.*W101_2'):
        ResNet.of("50")
    with pytest.raises(ValueError, match=r"stages=\(\) must hold"):
        ResNet(stages=())
    with pytest.raises(ValueError, match="groups=2.*those of a bottleneck"):
        ResNet(stages=(1,), block=Block.BASIC, groups=2)
    with pytest.raises(ValueError, match="width=8 with width_per_group=4"):
        ResNet(stages=(1,), width=8, width_per_group=4)


@pytest.mark.parametrize("block", Block)
def test_a_gradient_reaches_every_parameter(block):
    model = tiny(block=block, groups=1 if block == Block.BASIC else 2)
    variables = random_variables(model, images())

    def loss(params):
        everything = {**variables, "params": params}
        outputs, _ = model.apply(
            everything, images(), train=True, mutable=["batch_stats"]
        )
        return jnp.square(outputs["logits"] - jnp.arange(10)).sum()

    for name, gradient in trees.flatten(
        jax.jit(jax.grad(loss))(variables["params"])
    ).items():
        assert np.abs(gradient).max() > 1e-4, name


def test_units_start_as_the_identity_and_at_one_where_asked():
    for last, expected in ((0.0, 0), (1.0, 1)):
        init = jax.jit(tiny(last_scale=last).init)
        params = init(jax.random.key(0), images())["params"]
        unit = params["stage_2"]["unit_01"]
        assert (unit["norm3"]["scale"] == expected).all()
        assert (unit["norm2"]["scale"] == 1).all()
        assert (unit["norm_proj"]["scale"] == 1).all()


def test_the_norm_is_its_formula_and_its_averages_follow_the_batch():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 3, 5, 6)).astype(np.float32)
    scale, bias, mean = rng.normal(size=(3, 6)).astype(np.float32)
    variance = rng.uniform(1, 2, 6).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "variance": variance},
    }
    variables = jax.tree.map(jnp.asarray, variables)
    evaluated = BatchNorm().apply(variables, jnp.asarray(x))
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5, atol=1e-5)

    y, changed = BatchNorm().apply(
        variables, jnp.asarray(x), True, mutable=["batch_stats"]
    )
    exact = np.asarray(x, np.float64)
    m, v = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    expected = (exact - m) / np.sqrt(v + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    found = changed["batch_stats"]
    np.testing.assert_allclose(found["mean"], 0.9 * mean + 0.1 * m, rtol=1e-5)
    # That of a sample of 60, as torch keeps it.
    sample = exact.var((0, 1, 2), ddof=1)
    wanted = 0.9 * variance + 0.1 * sample
    np.testing.assert_allclose(found["variance"], wanted, rtol=1e-5)


def test_one_value_a_channel_has_no_variance():
    model = tiny(stages=(1, 1, 1, 1))
    variables = random_variables(model, images(1))
    with pytest.raises(ValueError, match=r"image of 1x1 in a batch of 1.*frozen"):
        trained(model, variables, images(1))
    trained(model.clone(statistics=Statistics.FROZEN), variables, images(1))


def test_statistics_are_float32_under_bfloat16():
    model = tiny(dtype=Dtype.BFLOAT16)
    variables = random_variables(model, images())
    outputs, statistics = trained(model, variables, images())
    assert outputs["grid"].dtype == jnp.bfloat16
    assert outputs["pooled"].dtype == outputs["logits"].dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(statistics))
    # Sums in bfloat16 would stop counting at 256 of the 256 values of this stage.
    exact, _ = trained(tiny(), variables, images())
    difference = np.abs(outputs["logits"] - exact["logits"]).max()
    assert difference < 0.05 * np.abs(exact["logits"]).max()


def test_remat_changes_no_number():
    variables = random_variables(tiny(), images())
    expected = trained(tiny(), variables, images())
    for remat in (Remat.DOTS, Remat.FULL):
        found = trained(tiny(remat=remat), variables, images())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_read_in_training_and_stay():
    model = tiny(statistics=Statistics.FROZEN)
    variables = random_variables(model, images())
    outputs, statistics = trained(model, variables, images())
    evaluated = jax.jit(model.apply)(variables, images())
    np.testing.assert_array_equal(outputs["logits"], evaluated["logits"])
    for a, b in zip(
        jax.tree.leaves(statistics),
        jax.tree.leaves(variables["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# Parameters may be frozen alone, or together with their unit, rematerialised or not.
@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_frozen_parts_keep_their_statistics_and_others_move(remat):
    frozen = ("stem.*", "stage_1/.*", "stage_2/unit_01/norm2/.*")
    run = start(tiny(remat=remat), freeze=frozen)
    before = jax.device_get(run.state.collections)
    run.advance(rows())
    after = trees.flatten(jax.device_get(run.state.collections))
    for name, value in trees.flatten(before).items():
        kept = name.removeprefix("batch_stats/").startswith(
            ("stem", "stage_1/", "stage_2/unit_01/norm2/")
        )
        assert np.array_equal(value, after[name]) == kept, name


@pytest.mark.slow  # test_norms.py has a smaller one
def test_eight_devices_give_the_gradients_and_statistics_of_one():
    found = {}
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        run = start(tiny(), devices=devices, fsdp=fsdp)
        (metrics,) = run.advance(rows())
        statistics = trees.flatten(jax.device_get(run.state.collections))
        found[devices, fsdp] = {
            "loss": metrics["loss"],
            **gradients(run.state),
            **statistics,
        }
    one = found.pop((1, 1))
    for many in found.values():
        for name, value in one.items():
            largest = np.abs(value).max()
            assert np.abs(many[name] - value).max() <= 1e-5 * largest + 1e-7, name
    # A device alone would have found other statistics in its rows.
    part = start(tiny())
    part.advance({name: x[:4] for name, x in rows().items()})
    alone = trees.flatten(jax.device_get(part.state.collections))
    name = "batch_stats/stem_norm/mean"
    assert np.abs(alone[name] - one[name]).max() > 1e-3 * np.abs(one[name]).max()


def test_micro_batches_are_refused_unless_the_statistics_stay():
    with pytest.raises(ValueError, match=r"batch_stats.*micro_batches=1.*=frozen"):
        start(tiny(), micro_batches=2)


@pytest.mark.slow
def test_micro_batches_step_like_the_whole_batch_where_the_statistics_stay():
    found = {}
    for parts, devices in ((1, 1), (2, 1), (2, 4)):
        run = start(
            tiny(statistics=Statistics.FROZEN), micro_batches=parts, devices=devices
        )
        before = jax.device_get(run.state.collections)
        (metrics,) = run.advance(rows())
        after = jax.device_get(run.state.collections)
        assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
        found[parts, devices] = {"loss": metrics["loss"], **gradients(run.state)}
    one = found.pop((1, 1))
    for other in found.values():
        for name, value in one.items():
            largest = np.abs(value).max()
            assert np.abs(other[name] - value).max() <= 1e-5 * largest + 1e-7, name


def test_layer_decay_counts_the_units():
    shapes = jax.eval_shape(tiny().init, jax.random.key(0), images())["params"]
    above = trees.layers_above(trees.names(shapes), ResNet.layers)
    assert above["stem/kernel"] == above["stem_norm/scale"] == 3
    assert above["stage_1/unit_01/conv2/kernel"] == 2
    assert above["stage_2/unit_01/norm_proj/bias"] == 1
    assert above["head/kernel"] == 0


@pytest.mark.slow  # tests/outside resumes other collections
def test_a_resumed_run_has_the_statistics_of_a_straight_one_bit_for_bit(tmp_path):
    config = TrainConfig(
        num_steps=2,
        model=tiny(stages=(1,)),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=64),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.01)),
        ema=Average(start=0.9),
        checkpoints=Checkpoints(every_steps=1, keep_latest=9),
    )
    straight = jax.device_get(train.train(config, epath.Path(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    resumed = jax.device_get(train.train(config, epath.Path(tmp_path / "run")))
    names = [n for n in trees.names(resumed.collections) if n.endswith("variance")]
    assert len(names) == 5
    for (name, a), b in zip(
        trees.flatten(resumed).items(), jax.tree.leaves(straight), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert resumed.step == 2
