import jax
import jax.numpy as jnp
import optax
import pytest

from big_vision_lite import flops
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification


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


@pytest.mark.parametrize("depth", [6, 12])
def test_xla_computes_no_more_than_the_model_needs(depth):
    """Sees XLA:CPU recompute the residual sum in every later block, if it does."""
    model = ViT.of("S/16", depth=depth, head=Classifier(num_classes=1000))
    optimizer = optax.adamw(1e-3)
    image, label = images(8), jax.ShapeDtypeStruct((8,), jnp.int32)

    def step(params, opt_state, image, label):
        def loss(params):
            def forward(image):
                return model.apply({"params": params}, image, train=True)

            batch = {"image": image, "label": label}
            losses, _ = SoftmaxClassification()(forward, batch, jax.random.key(0))
            return losses.mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    arguments = (params, jax.eval_shape(optimizer.init, params), image, label)
    needed = flops.count(step, *arguments)
    assert needed == vit_formula(depth, batch=8)["step"]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    # Norms, softmax, GELU and AdamW are 0.8 % at any depth. With the two-pass variance,
    # which XLA fuses the residual sum into, 1.4 % at depth 6 and 2.0 % at 12.
    assert 0.99 <= compiled.cost_analysis()["flops"] / needed <= 1.012


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
