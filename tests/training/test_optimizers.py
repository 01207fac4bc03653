import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from big_vision_lite import trees, types
from big_vision_lite.schedules import Constant, WarmupCosine
from big_vision_lite.training import optimizers
from big_vision_lite.training.optimizers import (
    SGD,
    Adafactor,
    AdamW,
    Lion,
    MomentumDtype,
    Rule,
)

NUM_STEPS = 5
SCHEDULE = WarmupCosine(peak=1e-2, warmup_steps=2)
SHAPES = {
    "encoder/block_00/dense/bias": (4,),
    "encoder/block_00/dense/kernel": (3, 4),
    "encoder/block_01/dense/bias": (40,),
    "encoder/block_01/dense/kernel": (2, 33, 40),
    "encoder/norm/scale": (4,),
    "head/bias": (5,),
    "head/kernel": (4, 5),
    "patches/kernel": (2, 3),
}
# Depths 1, 2, above the last of the two blocks (3), and embeddings (0).
LAYERS_ABOVE = {"encoder/block_00": 2, "encoder/block_01": 1, "patches": 3}
RULES = (
    Rule(pattern="head/.*", learning_rate_multiplier=10.0),
    Rule(pattern="encoder/norm/.*", weight_decay_multiplier=0.5),
    Rule(
        pattern=".*/block_00/.*kernel",
        learning_rate_multiplier=0.5,
        weight_decay_multiplier=2.0,
    ),
    Rule(pattern=".*block_01.*bias", learning_rate_multiplier=0.0),
)


def random_leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


LAYERS = ("patches/.*|embedding/.*|position_embedding|cls", r"encoder/block_(\d+)/.*")


def nested(leaves):
    return trees.unflatten({name: jnp.asarray(leaf) for name, leaf in leaves.items()})


def run(optimizer, gradients):
    """Returns {name: parameter} after every update of the real chain."""
    chain = optimizer.build(NUM_STEPS, LAYERS)
    params = nested(random_leaves(99))
    state = chain.init(params)
    update = jax.jit(chain.update)
    history = []
    for gradient in gradients:
        updates, state = update(nested(gradient), state, params)
        params = optax.apply_updates(params, updates)
        history.append(trees.flatten(params))
    return history


def by_hand(optimizer, make_direction, gradients):
    """Returns the same from the formula in the module's docstring, in float64."""
    learning_rate, peak = optimizer.schedule.build(NUM_STEPS), optimizer.schedule.peak
    params = {n: x.astype(np.float64) for n, x in random_leaves(99).items()}
    directions = {name: make_direction() for name in SHAPES}
    history = []
    for step, gradient in enumerate(gradients):
        gradient = {n: x.astype(np.float64) for n, x in gradient.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        if optimizer.clip_norm is not None and norm >= optimizer.clip_norm:
            gradient = {n: g / norm * optimizer.clip_norm for n, g in gradient.items()}
        lr = float(learning_rate(step))
        params = dict(params)
        for name, p in params.items():
            m, w = multipliers_by_hand(optimizer, name)
            d = directions[name](gradient[name], step)
            params[name] = p - lr * m * d - lr / peak * optimizer.weight_decay * w * p
        history.append(params)
    return history


def multipliers_by_hand(optimizer, name):
    m, w = 1.0, 1.0 if name.endswith("kernel") else 0.0
    if optimizer.rules:
        if name.startswith("head/"):
            m = 10.0
        elif name == "encoder/norm/scale":
            w = 0.5
        elif name == "encoder/block_00/dense/kernel":
            m, w = 0.5, 2.0
        elif name == "encoder/block_01/dense/bias":
            m, w = 0.0, 0.0
    if optimizer.layer_decay is not None:
        for part, above in LAYERS_ABOVE.items():
            if name.startswith(part):
                m, w = (
                    m * optimizer.layer_decay**above,
                    w * optimizer.layer_decay**above,
                )
    return m, w


def stored(x, dtype):
    if dtype == MomentumDtype.BFLOAT16:
        return np.float64(np.float32(x).astype(ml_dtypes.bfloat16))
    return np.float64(x)


def decayed(beta, average, dtype):
    """Multiplies as optax does: by the decay in the dtype of the stored average."""
    return stored(beta, dtype) * average


def adam_by_hand(optimizer):
    mu = nu = 0.0

    def direction(g, step):
        nonlocal mu, nu
        b1, b2 = optimizer.beta1, optimizer.beta2
        fresh = decayed(b1, mu, optimizer.momentum_dtype) + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * g**2
        mu = stored(fresh, optimizer.momentum_dtype)
        t = step + 1
        root = np.sqrt(nu / (1 - b2**t))
        return fresh / (1 - b1**t) / (root + optimizer.epsilon)

    return direction


def lion_by_hand(optimizer):
    momentum = 0.0

    def direction(g, step):
        nonlocal momentum
        sign = np.sign(optimizer.beta1 * momentum + (1 - optimizer.beta1) * g)
        fresh = decayed(optimizer.beta2, momentum, optimizer.momentum_dtype)
        momentum = stored(fresh + (1 - optimizer.beta2) * g, optimizer.momentum_dtype)
        return sign

    return direction


def sgd_by_hand(optimizer):
    trace = 0.0

    def direction(g, step):
        nonlocal trace
        fresh = g + decayed(optimizer.momentum, trace, optimizer.momentum_dtype)
        trace = stored(fresh, optimizer.momentum_dtype)
        return g + optimizer.momentum * fresh if optimizer.nesterov else fresh

    return direction


def adafactor_by_hand(optimizer):
    rows = columns = whole = average = 0.0

    def direction(g, step):
        nonlocal rows, columns, whole, average
        beta2 = min(optimizer.beta2_cap, 1 - (step + 1.0) ** -0.8)
        squared = g**2 + 1e-30
        *_, second, largest = np.argsort(g.shape) if g.ndim > 1 else (0, 0)
        if g.ndim > 1 and g.shape[second] >= optimizer.min_factored_size:
            mean = squared.mean(largest, keepdims=True)
            rows = beta2 * rows + (1 - beta2) * mean
            mean = squared.mean(second, keepdims=True)
            columns = beta2 * columns + (1 - beta2) * mean
            second_moment = rows * columns / rows.mean(second, keepdims=True)
        else:
            whole = beta2 * whole + (1 - beta2) * squared
            second_moment = whole
        scaled = g / np.sqrt(second_moment)
        decay = optimizer.momentum
        fresh = decayed(decay, average, optimizer.momentum_dtype) + (1 - decay) * scaled
        average = stored(fresh, optimizer.momentum_dtype)
        return fresh

    return direction


FLOAT32, BFLOAT16 = MomentumDtype.FLOAT32, MomentumDtype.BFLOAT16
FULL = {"schedule": SCHEDULE, "weight_decay": 0.1, "rules": RULES}
CASES = {
    "adamw": (AdamW(schedule=SCHEDULE), adam_by_hand),
    "adamw, all on": (AdamW(**FULL, layer_decay=0.7, beta2=0.95), adam_by_hand),
    "adamw, bfloat16": (AdamW(**FULL, momentum_dtype=BFLOAT16), adam_by_hand),
    "adamw, not clipped": (AdamW(**FULL, clip_norm=None), adam_by_hand),
    "lion": (Lion(schedule=SCHEDULE), lion_by_hand),
    "lion, all on": (Lion(**FULL, layer_decay=0.7, beta1=0.95), lion_by_hand),
    "sgd": (SGD(schedule=SCHEDULE), sgd_by_hand),
    "sgd, all on": (SGD(**FULL, layer_decay=0.7, nesterov=True), sgd_by_hand),
    "sgd, bfloat16": (SGD(**FULL, momentum_dtype=BFLOAT16), sgd_by_hand),
    "sgd, no momentum": (SGD(**FULL, momentum=0.0), sgd_by_hand),
    "adafactor": (Adafactor(schedule=SCHEDULE), adafactor_by_hand),
    "adafactor, all on": (
        Adafactor(**FULL, layer_decay=0.7, beta2_cap=0.6, momentum_dtype=FLOAT32),
        adafactor_by_hand,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_chain_equals_its_formula_over_five_steps(name):
    optimizer, direction = CASES[name]
    # Norms from far above to far below clip_norm: some are clipped, some are not.
    gradients = [random_leaves(i, scale) for i, scale in enumerate((1, 1e-3, 1, 0.02))]
    gradients.append(random_leaves(4, 10.0))
    ours = run(optimizer, gradients)
    expected = by_hand(optimizer, lambda: direction(optimizer), gradients)
    # float32 against float64, where the largest updates are 0.1. XLA is free to round
    # optax's bfloat16 products or not; that moves them by 2^-9.
    atol = 3e-4 if optimizer.momentum_dtype == BFLOAT16 else 1e-5
    for have, want in zip(ours, expected, strict=True):
        for leaf in SHAPES:
            np.testing.assert_allclose(
                have[leaf], want[leaf], rtol=2e-6, atol=atol, err_msg=leaf
            )
    start = random_leaves(99)
    for leaf in SHAPES:
        np.testing.assert_array_equal(ours[0][leaf], start[leaf])  # rate 0 at step 0


def test_adamw_equals_torchs_with_its_decay_times_the_peak():
    gradients = [random_leaves(i) for i in range(NUM_STEPS)]
    torch_decay = 0.3
    ours = AdamW(
        schedule=SCHEDULE, weight_decay=torch_decay * SCHEDULE.peak, clip_norm=None
    )

    class Torchs:
        def build(self, num_steps, layers=()):
            return optax.adamw(
                SCHEDULE.build(num_steps),
                weight_decay=torch_decay,
                mask=lambda params: trees.map_named(
                    lambda name, _: name.endswith("kernel"), params
                ),
            )

    torchs = run(Torchs(), gradients)
    for have, want in zip(run(ours, gradients), torchs, strict=True):
        for leaf in SHAPES:
            np.testing.assert_allclose(have[leaf], want[leaf], rtol=1e-6, atol=1e-6)


def test_decay_follows_the_schedule_but_not_its_height():
    zero = [{n: np.zeros(s, np.float32) for n, s in SHAPES.items()}] * NUM_STEPS
    low, high = (
        run(
            AdamW(schedule=WarmupCosine(peak=peak, warmup_steps=2), weight_decay=0.1),
            zero,
        )
        for peak in (1e-4, 1e-1)
    )
    start = random_leaves(99)
    shape = WarmupCosine(peak=1.0, warmup_steps=2).build(NUM_STEPS)
    factors = np.cumprod([1 - 0.1 * float(shape(step)) for step in range(NUM_STEPS)])
    for step in range(NUM_STEPS):
        np.testing.assert_allclose(
            low[step]["head/kernel"], high[step]["head/kernel"], rtol=1e-6
        )
        np.testing.assert_allclose(
            low[step]["head/kernel"], start["head/kernel"] * factors[step], rtol=1e-6
        )
        np.testing.assert_array_equal(low[step]["head/bias"], start["head/bias"])


def test_decay_moves_along_half_a_cosine_to_its_end():
    optimizer = AdamW(schedule=SCHEDULE, weight_decay=0.04, weight_decay_end=0.4)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    history = run(optimizer, [zeros] * NUM_STEPS)
    rate = SCHEDULE.build(NUM_STEPS)
    kernel = random_leaves(99)["head/kernel"].astype(np.float64)
    for step, params in enumerate(history):
        decay = 0.4 - 0.36 * (1 + np.cos(np.pi * step / NUM_STEPS)) / 2
        kernel = kernel * (1 - float(rate(step)) / SCHEDULE.peak * decay)
        np.testing.assert_allclose(params["head/kernel"], kernel, rtol=1e-5)
        np.testing.assert_array_equal(
            params["head/bias"], random_leaves(99)["head/bias"]
        )
    with pytest.raises(ValueError, match="weight_decay_end=-1"):
        AdamW(schedule=SCHEDULE, weight_decay_end=-1.0)


def test_multiplier_zero_leaves_parameters_untouched_whatever_the_gradient():
    rules = (Rule(pattern="head/.*", learning_rate_multiplier=0.0),)
    gradients = [random_leaves(i) for i in range(NUM_STEPS)]
    gradients[1]["head/bias"] *= 1e30
    for optimizer in (
        AdamW(schedule=SCHEDULE, rules=rules, weight_decay=0.5),
        SGD(schedule=SCHEDULE, rules=rules, weight_decay=0.5),
    ):
        last = run(optimizer, gradients)[-1]
        start = random_leaves(99)
        for name in SHAPES:
            frozen = name.startswith("head/")
            assert np.array_equal(last[name], start[name]) == frozen, name


def test_the_first_rule_that_matches_gives_both_multipliers():
    rules = (
        Rule(pattern="head/kernel", learning_rate_multiplier=0.0),
        Rule(pattern="head/.*", learning_rate_multiplier=3.0),
    )
    gradients = [random_leaves(i) for i in range(3)]
    ours = run(SGD(schedule=SCHEDULE, rules=rules), gradients)
    plain = run(SGD(schedule=SCHEDULE), gradients)
    start = random_leaves(99)
    np.testing.assert_array_equal(ours[-1]["head/kernel"], start["head/kernel"])
    np.testing.assert_allclose(
        ours[-1]["head/bias"] - start["head/bias"],
        3 * (plain[-1]["head/bias"] - start["head/bias"]),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(schedule=Constant(peak=0.05), weight_decay=0.0),
        SGD(schedule=Constant(peak=0.05), clip_norm=None),
        SGD(schedule=Constant(peak=0.05), clip_norm=None, nesterov=True),
        Adafactor(schedule=WarmupCosine(peak=0.05)),
        Lion(schedule=WarmupCosine(peak=0.02), weight_decay=0.0),
    ],
)
def test_every_optimizer_minimises_a_quadratic(optimizer):
    assert isinstance(optimizer, types.Optimizer)
    chain = optimizer.build(400)
    target = {"a": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)}}

    def loss(params):
        return jnp.sum((params["a"]["kernel"] - target["a"]["kernel"]) ** 2)

    @jax.jit
    def step(_, carry):
        params, state = carry
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.zeros_like, target)
    params, _ = jax.lax.fori_loop(0, 400, step, (params, chain.init(params)))
    assert float(loss(params)) < 1e-3
    assert float(loss(target)) == 0


def test_the_state_is_arrays_with_unique_names_and_the_promised_dtypes():
    params = nested(random_leaves(99))
    for optimizer, moments in (
        (AdamW(schedule=SCHEDULE, momentum_dtype=BFLOAT16), {"mu": BFLOAT16}),
        (AdamW(schedule=SCHEDULE), {"mu": FLOAT32, "nu": FLOAT32}),
        (SGD(schedule=SCHEDULE, momentum_dtype=BFLOAT16), {"trace": BFLOAT16}),
        (Lion(schedule=SCHEDULE, momentum_dtype=BFLOAT16), {"mu": BFLOAT16}),
        (Adafactor(schedule=SCHEDULE), {"ema": BFLOAT16}),
    ):
        state = optimizer.build(NUM_STEPS).init(params)
        leaves = trees.flatten(state)
        assert len(leaves) == len(jax.tree.leaves(state))
        assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
        for moment, dtype in moments.items():
            kept = [x for name, x in leaves.items() if f"/{moment}/" in name]
            assert len(kept) == len(SHAPES)
            assert {str(leaf.dtype) for leaf in kept} == {dtype.value}
    plain = SGD(schedule=SCHEDULE, momentum=0.0).build(NUM_STEPS).init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [()]  # the step count


def test_adafactor_stores_rows_and_columns_of_large_kernels_only():
    params = nested(random_leaves(99))
    state = Adafactor(schedule=SCHEDULE).build(NUM_STEPS).init(params)
    leaves = trees.flatten(state)
    kept = {
        name: {k: leaf.shape for k, leaf in leaves.items() if k.endswith(name)}
        for name in ("block_01/dense/kernel", "head/kernel")
    }
    large = [s for k, s in kept["block_01/dense/kernel"].items() if "/v" in k]
    small = [s for k, s in kept["head/kernel"].items() if "/v" in k]
    assert sorted(large) == [(1,), (2, 33), (2, 40)]
    assert sorted(small) == [(1,), (1,), (4, 5)]


def test_a_rule_that_matches_nothing_is_refused_before_the_first_step():
    params = nested(random_leaves(99))
    typo = AdamW(schedule=SCHEDULE, rules=(Rule(pattern="haed/kernel"),))
    with pytest.raises(
        ValueError, match='optimizer.rules "haed/kernel".* Did you mean "head/kernel"'
    ):
        typo.build(NUM_STEPS).init(params)
    broken = AdamW(schedule=SCHEDULE, rules=(Rule(pattern="*kernel"),))
    with pytest.raises(ValueError, match="is not a regular expression"):
        jax.eval_shape(broken.build(NUM_STEPS).init, params)
    with pytest.raises(TypeError, match="weight_deacy"):
        Rule(pattern=".*", weight_deacy=1.0)  # type: ignore[call-arg]


def test_layer_decay_without_blocks_is_refused():
    chain = AdamW(schedule=SCHEDULE, layer_decay=0.75).build(NUM_STEPS)
    with pytest.raises(
        ValueError, match=r"layer_decay counts .*layers=.. none with a number"
    ):
        chain.init({"head": {"kernel": jnp.ones((2, 2))}})


def test_a_warm_up_longer_than_the_run_is_refused_when_built():
    optimizer = AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=100))
    with pytest.raises(ValueError, match="warmup_steps=100 leaves nothing"):
        optimizer.build(50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(schedule=SCHEDULE, weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: AdamW(schedule=SCHEDULE, clip_norm=0.0), "clip_norm=none switches"),
        (lambda: AdamW(schedule=SCHEDULE, beta1=1.0), "beta1=1.0 must be"),
        (lambda: AdamW(schedule=SCHEDULE, beta2=9.0), "beta2=9.0 must be"),
        (lambda: AdamW(schedule=SCHEDULE, layer_decay=1.5), "layer_decay=1.5"),
        (lambda: Lion(schedule=SCHEDULE, beta2=1.0), "beta2=1.0 must be"),
        (lambda: SGD(schedule=SCHEDULE, momentum=-0.1), "momentum=-0.1"),
        (lambda: SGD(schedule=SCHEDULE, momentum=0.0, nesterov=True), "does nothing"),
        (lambda: Adafactor(schedule=SCHEDULE, beta2_cap=1.0), "beta2_cap=1.0"),
        (
            lambda: Rule(pattern="x", learning_rate_multiplier=-1.0),
            "learning_rate_multiplier=-1.0",
        ),
        (
            lambda: Rule(pattern="x", weight_decay_multiplier=float("nan")),
            "multiplier=nan",
        ),
        (
            lambda: Rule(
                pattern="x", learning_rate_multiplier=0.0, weight_decay_multiplier=1.0
            ),
            "would do nothing",
        ),
    ],
)
def test_values_that_make_no_optimizer_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_optimizer_shares_the_fields_of_the_chain():
    shared = {"schedule", "weight_decay", "clip_norm", "rules", "layer_decay"}
    for kind in (AdamW, Lion, SGD, Adafactor):
        assert shared <= {field.name for field in dataclasses.fields(kind)}
        assert isinstance(kind(schedule=SCHEDULE), optimizers.ChainConfig)
