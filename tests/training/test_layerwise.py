import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_lite import trees
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.vit import ViT
from big_vision_lite.schedules import Constant, WarmupCosine
from big_vision_lite.training.layerwise import LAMB, LARS, Muon
from big_vision_lite.training.optimizers import Rule
from big_vision_lite.types import Optimizer, layers_of

NUM_STEPS = 4
SCHEDULE = WarmupCosine(peak=1e-2, warmup_steps=1)
SHAPES = {
    "encoder/block_00/attention/query/kernel": (6, 2, 4),
    "encoder/block_00/attention/out/kernel": (2, 4, 6),
    "encoder/block_00/mlp/hidden/bias": (9,),
    "encoder/block_00/mlp/hidden/kernel": (6, 9),
    "encoder/block_01/conv/kernel": (2, 2, 3, 5),
    "head/kernel": (6, 3),
    "patch_embedding/kernel": (2, 2, 1, 6),
}
LAYERS = ("patch_embedding/.*", r"encoder/block_(\d+)/.*")
LAYERS_ABOVE = {"patch_embedding": 3, "encoder/block_00": 2, "encoder/block_01": 1}
RULES = (
    Rule(pattern="head/.*", learning_rate_multiplier=3.0, weight_decay_multiplier=0.0),
    Rule(pattern=".*/conv/.*", weight_decay_multiplier=2.0),
)


def random_leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: scale * rng.standard_normal(shape) for n, shape in SHAPES.items()}


def nested(leaves):
    return trees.unflatten({n: jnp.asarray(x, jnp.float32) for n, x in leaves.items()})


def run(optimizer, gradients):
    """Returns the parameters after every update of the real chain."""
    chain = optimizer.build(NUM_STEPS, LAYERS)
    params = nested(random_leaves(99))
    state = chain.init(params)
    history = []
    for gradient in gradients:
        updates, state = jax.jit(chain.update)(nested(gradient), state, params)
        params = optax.apply_updates(params, updates)
        history.append(trees.flatten(params))
    return history


def by_hand(optimizer, direction, gradients):
    """Returns the same in float64; direction(name, g, p, step, decay factor)."""
    learning_rate = optimizer.schedule.build(NUM_STEPS)
    params, history = random_leaves(99), []
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        if optimizer.clip_norm is not None and norm > optimizer.clip_norm:
            gradient = {n: g * optimizer.clip_norm / norm for n, g in gradient.items()}
        rate, params = float(learning_rate(step)), dict(params)
        for name, p in params.items():
            m, w = 1.0, float(name.endswith("kernel"))
            if optimizer.rules and name.startswith("head"):
                m, w = 3.0, 0.0
            if optimizer.rules and "/conv/" in name:
                w = 2.0
            if optimizer.layer_decay is not None:
                above = [n for part, n in LAYERS_ABOVE.items() if name.startswith(part)]
                m *= optimizer.layer_decay ** (above[0] if above else 0)
            params[name] = p - rate * m * direction(name, gradient[name], p, step, w)
        history.append(params)
    return history


def norm(x):
    return np.sqrt((x**2).sum())


def lars_by_hand(optimizer):
    momentum = dict.fromkeys(SHAPES, 0.0)

    def direction(name, g, p, step, w):
        u = g + optimizer.weight_decay * w * p
        if w:
            u = u * optimizer.trust_coefficient * norm(p) / norm(u)
        momentum[name] = u + optimizer.momentum * momentum[name]
        return momentum[name]

    return direction


def adam(beta1, beta2, epsilon):
    mu, nu = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0)

    def direction(name, g, step):
        mu[name] = beta1 * mu[name] + (1 - beta1) * g
        nu[name] = beta2 * nu[name] + (1 - beta2) * g**2
        root = np.sqrt(nu[name] / (1 - beta2 ** (step + 1)))
        return mu[name] / (1 - beta1 ** (step + 1)) / (root + epsilon)

    return direction


def lamb_by_hand(optimizer):
    of_adam = adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)

    def direction(name, g, p, step, w):
        u = of_adam(name, g, step) + optimizer.weight_decay * w * p
        return u * norm(p) / norm(u) if w else u

    return direction


def orthogonal(matrix):
    """Five rounds of the quintic iteration, the smaller side first."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


MATRICES = {  # inputs x outputs
    "encoder/block_00/attention/query/kernel": (6, 8),
    "encoder/block_00/attention/out/kernel": (8, 6),
    "encoder/block_00/mlp/hidden/kernel": (6, 9),
    "encoder/block_01/conv/kernel": (12, 5),
}


def muon_by_hand(optimizer):
    of_adam = adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
    momentum, beta = dict.fromkeys(MATRICES, 0.0), optimizer.momentum

    def direction(name, g, p, step, w):
        share = optimizer.weight_decay * w / optimizer.schedule.peak
        if name not in MATRICES:
            return of_adam(name, g, step) + share * p
        momentum[name] = beta * momentum[name] + (1 - beta) * g
        now, then = step + 1, step + 2
        nesterov = beta * momentum[name] / (1 - beta**then)
        nesterov = nesterov + (1 - beta) * g / (1 - beta**now)
        update = orthogonal(nesterov.reshape(MATRICES[name])).reshape(g.shape)
        scale = optimizer.update_rms * np.sqrt(max(MATRICES[name]))
        return scale * update + share * p

    return direction


FULL = {"schedule": SCHEDULE, "rules": RULES, "layer_decay": 0.7}
CASES = {
    "lars": (LARS(schedule=SCHEDULE, weight_decay=0.3), lars_by_hand),
    "lars, all on": (LARS(**FULL, weight_decay=0.3, clip_norm=1.0), lars_by_hand),
    "lamb": (LAMB(schedule=SCHEDULE), lamb_by_hand),
    "lamb, all on": (LAMB(**FULL, weight_decay=0.3), lamb_by_hand),
    "muon": (Muon(schedule=SCHEDULE), muon_by_hand),
    "muon, rules": (Muon(schedule=SCHEDULE, rules=RULES, beta2=0.95), muon_by_hand),
}


@pytest.mark.parametrize("name", CASES)
def test_the_update_equals_its_formula_over_four_steps(name):
    optimizer, direction = CASES[name]
    assert isinstance(optimizer, Optimizer)
    gradients = [random_leaves(i, scale) for i, scale in enumerate((1, 1e-2, 1, 0.1))]
    ours = run(optimizer, gradients)
    expected = by_hand(optimizer, direction(optimizer), gradients)
    for have, want in zip(ours, expected, strict=True):
        for leaf in SHAPES:
            # float32 against float64; the products of Muon lose a little more.
            np.testing.assert_allclose(have[leaf], want[leaf], atol=5e-6, err_msg=leaf)
    moved = {n: np.abs(ours[-1][n] - random_leaves(99)[n]).max() for n in SHAPES}
    assert min(moved.values()) > 1e-5


def test_lars_and_lamb_step_alike_whatever_the_scale_of_the_gradient():
    small, large = ([random_leaves(1, scale)] * NUM_STEPS for scale in (10.0, 1e4))
    for kind in (LARS, LAMB):
        optimizer = kind(schedule=Constant(peak=0.1), weight_decay=0.0, clip_norm=None)
        one, other = run(optimizer, small)[-1], run(optimizer, large)[-1]
        for name in SHAPES:
            if name.endswith("kernel"):
                np.testing.assert_allclose(one[name], other[name], atol=1e-4)


def test_muon_moves_all_directions_of_a_matrix_and_leaves_none_behind():
    gradient = random_leaves(1)
    flat = np.zeros((6, 9))
    flat[0, 0], flat[1, 1:] = 100.0, 0.1  # two directions, 350 times apart
    gradient["encoder/block_00/mlp/hidden/kernel"] = flat
    optimizer = Muon(schedule=Constant(peak=1.0), weight_decay=0.0, clip_norm=None)
    found = run(optimizer, [gradient])[0]["encoder/block_00/mlp/hidden/kernel"]
    moved = random_leaves(99)["encoder/block_00/mlp/hidden/kernel"] - found
    values = np.linalg.svd(moved, compute_uv=False) / (0.2 * 3)
    # The rounds leave singular values in 0.7..1.2, not at 1 exactly.
    assert (values[:2] > 0.5).all() and (values[:2] < 1.3).all()
    assert (values[2:] < 1e-3).all()


def kinds_of(optimizer, model):
    image = jnp.zeros((1, 8, 8, 1), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    state = jax.eval_shape(optimizer.build(9, layers_of(model)).init, params)
    names = trees.names(state)
    leaves = trees.names(params)
    matrices = {leaf for leaf in leaves if any(
        "/matrix/" in name and name.endswith(f"/mu/{leaf}") for name in names
    )}  # fmt: skip
    adam = {
        leaf for leaf in leaves if any(name.endswith(f"/nu/{leaf}") for name in names)
    }
    assert matrices | adam == set(leaves) and not matrices & adam
    return matrices


def test_matrices_are_the_kernels_of_the_backbones_blocks_or_those_named():
    vit = ViT(width=8, depth=2, mlp_dim=8, num_heads=2, patch_size=4)
    kernels = ("attention/key", "attention/out", "attention/query", "attention/value")
    kernels += ("mlp/hidden", "mlp/out")
    blocks = {f"encoder/block_0{i}/{name}/kernel" for i in (0, 1) for name in kernels}
    optimizer = Muon(schedule=SCHEDULE)
    assert kinds_of(optimizer, vit) == blocks
    masked = MaskedAutoencoder(
        encoder=vit, decoder_width=8, decoder_depth=1, decoder_heads=2
    )
    inside = {f"encoder/{name}" for name in blocks}
    assert kinds_of(optimizer, masked) == inside
    named = Muon(schedule=SCHEDULE, matrices=(".*block.*/mlp/.*kernel",))
    assert kinds_of(named, vit) == {name for name in blocks if "/mlp/" in name}


def test_muon_without_matrices_is_refused():
    params = nested(random_leaves(99))
    with pytest.raises(ValueError, match=r"layers=\(\) of its class.*optimizer.matr"):
        Muon(schedule=SCHEDULE).build(NUM_STEPS).init(params)
    typo = Muon(schedule=SCHEDULE, matrices=(".*/kernle",))
    with pytest.raises(ValueError, match='optimizer.matrices ".*/kernle" matches no'):
        typo.build(NUM_STEPS, LAYERS).init(params)
    flat = Muon(schedule=SCHEDULE, matrices=(".*",))
    with pytest.raises(ValueError, match=r"hidden/bias \(9,\).* no matrix"):
        flat.build(NUM_STEPS, LAYERS).init(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LARS(schedule=SCHEDULE, trust_coefficient=0.0), "cient=0.0 must be"),
        (lambda: LARS(schedule=SCHEDULE, momentum=1.0), "momentum=1.0 must be"),
        (lambda: LAMB(schedule=SCHEDULE, beta2=1.0), "beta2=1.0 must be"),
        (lambda: LAMB(schedule=SCHEDULE, weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: Muon(schedule=SCHEDULE, update_rms=0.0), "update_rms=0.0 must be"),
        (lambda: Muon(schedule=SCHEDULE, momentum=-0.1), "momentum=-0.1"),
    ],
)
def test_values_that_make_no_optimizer_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [LARS, LAMB, Muon])
def test_multiplier_zero_leaves_parameters_untouched(kind):
    rules = (Rule(pattern=".*/mlp/.*", learning_rate_multiplier=0.0),)
    optimizer = dataclasses.replace(kind(schedule=SCHEDULE), rules=rules)
    last = run(optimizer, [random_leaves(i) for i in range(NUM_STEPS)])[-1]
    start = trees.flatten(nested(random_leaves(99)))
    for name in SHAPES:
        assert np.array_equal(last[name], start[name]) == ("/mlp/" in name), name
