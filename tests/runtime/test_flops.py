import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runtime import flops, sharding
from big_vision_lite.schedules import Constant
from big_vision_lite.training import program
from big_vision_lite.training.optimizers import AdamW


def forward_flops(model, image):
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    return flops.count(model.apply, params, image)


def images(batch=1):
    return jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.uint8)


def vit_formula(depth, batch, tokens=196, width=384, mlp=1536, classes=1000):
    stem = 2 * tokens * 16 * 16 * 3 * width
    projections = 2 * tokens * (4 * width**2 + 2 * width * mlp)
    attention = 2 * 2 * tokens**2 * width
    forward = stem + depth * (projections + attention) + 2 * width * classes
    return {"forward": batch * forward, "step": batch * (3 * forward - stem)}


def test_vit_flops_equal_the_formula():
    model = ViT.of("S/16", head=Classifier(num_classes=1000))
    counted = forward_flops(model, images())
    assert counted == vit_formula(depth=12, batch=1)["forward"]
    assert counted / 1e9 == pytest.approx(9.15, abs=0.005)


def test_resnet_flops_equal_a_sum_over_its_convolutions():
    def conv(side, size, inputs, outputs):
        return 2 * side**2 * size**2 * inputs * outputs

    expected, inputs = conv(112, 7, 3, 64), 64
    for stage, units in enumerate((3, 4, 6, 3)):
        width, out, side = 64 * 2**stage, 256 * 2**stage, 56 // 2**stage
        for unit in range(units):
            # The first unit of a stage strides in its 3x3 convolution.
            before = side * 2 if unit == 0 and stage else side
            expected += conv(before, 1, inputs, width) + conv(side, 3, width, width)
            expected += conv(side, 1, width, out)
            expected += conv(side, 1, inputs, out) if unit == 0 else 0
            inputs = out
    expected += 2 * 2048 * 1000
    model = BiT.of("R50x1", head=Classifier(num_classes=1000))
    counted = forward_flops(model, images())
    assert counted == expected
    assert counted / 1e9 == pytest.approx(8.18, abs=0.005)


def test_gradients_cost_twice_the_forward_pass_less_the_stem():
    model = BiT.of("small", head=Classifier(num_classes=10))
    image = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    gradient = jax.grad(lambda params, x: model.apply(params, x)["logits"].sum())
    stem = 2 * 2 * 8 * 8 * 3 * 3 * 32
    expected = 3 * forward_flops(model, image) - stem
    assert flops.count(gradient, params, image) == expected


def test_convolutions_with_strides_and_groups_count_what_a_loop_does():
    x, kernel = jnp.ones((2, 9, 7, 6)), jnp.ones((3, 3, 2, 9))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    products = 2 * (4 * 3) * 9 * (3 * 3 * 2)  # batch, out pixels, out channels, window
    assert flops.count(conv, x, kernel) == 2 * products
    both = jax.grad(lambda *args: jnp.square(conv(*args)).sum(), (0, 1))
    assert flops.count(both, x, kernel) == 3 * 2 * products


def test_loops_conditions_and_wrappers_count_what_is_inside():
    a = jnp.ones((4, 4))
    one = 2 * 4**3

    def three(x):
        return jax.lax.scan(lambda c, _: (c @ a, None), x, length=3)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, three, lambda x: x @ a, x)

    @jax.custom_vjp
    def custom(x):
        return x @ a

    custom.defvjp(lambda x: (x @ a, None), lambda _, g: (g @ a.T,))
    assert flops.count(lambda x: x @ a, a) == one
    assert flops.count(jax.jit(three), a) == 3 * one
    assert flops.count(branch, a) == 3 * one
    assert flops.count(custom, a) == one
    assert flops.count(jax.checkpoint(lambda x: x @ a), a) == one
    assert flops.count(jax.vmap(lambda v: a @ v), a) == one
    assert flops.count(jnp.sin, a) == 0


def test_a_loop_of_unknown_length_is_refused():
    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"jax\.lax\.scan"):
        flops.count(endless, jnp.ones((2, 2)))


def real_step(**fields):
    """A compiled train step of ViT-S/16, batch 8: its program, specs, and it."""
    names = [str(number) for number in range(1000)]
    source = InMemory(np.zeros((8, 1, 1, 3)), np.arange(8), names)
    config = TrainConfig(
        num_steps=10,
        model=ViT.of("S/16", head=Classifier(num_classes=1000), **fields),
        objective=SoftmaxClassification(),
        data=Stream(source=source, batch_size=8),
        preprocess=(),
        optimizer=AdamW(schedule=Constant(peak=1e-3), weight_decay=1e-4),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    spec = {"image": images(8), "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
    with jax.set_mesh(mesh):
        built = program.build(config, mesh, spec)
        return built, spec, built.train_step.lower(built.abstract, spec).compile()


@pytest.mark.parametrize("depth", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_xla_computes_no_more_than_the_model_needs(depth):
    """The real step: XLA:CPU may not compute a residual sum again in every block."""
    built, spec, compiled = real_step(depth=depth)
    xla = compiled.cost_analysis()["flops"]
    formula = vit_formula(depth, batch=8)
    assert flops.count(built.train_step, built.abstract, spec) == formula["step"]
    assert built.flops_per_step == 3 * formula["forward"]
    # Norms, softmax, GELU, computed again for its gradient, the clip and AdamW.
    assert 0.99 <= xla / formula["step"] <= 1.03
    # What the log line's MFU is computed from counts a gradient for the stem, too.
    assert 0.99 <= xla / built.flops_per_step <= 1.03


def test_what_runs_twice_counts_twice():
    model = ViT.of("Ti/16", depth=1)
    image = images()
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    counts = []
    for remat in ("none", "full"):
        net = model.clone(remat=type(model.remat)(remat))
        gradient = jax.grad(lambda p, x, net=net: net.apply(p, x)["pooled"].sum())
        counts.append(flops.count(gradient, params, image))
    # All of the block but its last product, which no gradient needs.
    assert 1.15 < counts[1] / counts[0] < 4 / 3
