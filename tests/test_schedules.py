import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite import schedules, types

PEAK, WARMUP, STEPS = 3e-3, 7, 40


def table(schedule, num_steps):
    return np.array(schedule.build(num_steps)(np.arange(num_steps)))


def warmup(step):
    return min(1.0, step / WARMUP)


def done(step):
    return min(max((step - WARMUP) / (STEPS - WARMUP), 0), 1)


# Every formula again, one step at a time in float64, as the papers write it.
CASES = {
    "cosine": (
        schedules.WarmupCosine(peak=PEAK, warmup_steps=WARMUP),
        lambda s: PEAK * 0.5 * (1 + np.cos(np.pi * done(s))) * warmup(s),
    ),
    "linear": (
        schedules.WarmupLinear(peak=PEAK, warmup_steps=WARMUP, end_fraction=0.1),
        lambda s: PEAK * (0.1 + 0.9 * (1 - done(s))) * warmup(s),
    ),
    "rsqrt": (
        schedules.WarmupRsqrt(
            peak=PEAK, warmup_steps=WARMUP, timescale_steps=9, cooldown_steps=10
        ),
        lambda s: (
            PEAK
            * (1 if s < WARMUP else 1 / np.sqrt(1 + (s - WARMUP) / 9))
            * warmup(s)
            * min(1, (STEPS - s) / 10)
        ),
    ),
    "shifted rsqrt": (
        schedules.WarmupRsqrt(
            peak=PEAK, warmup_steps=WARMUP, timescale_steps=9, shift_steps=4
        ),
        lambda s: (
            PEAK * warmup(s) / np.sqrt(1 + (4 + (s - WARMUP if s > WARMUP else 0)) / 9)
        ),
    ),
    "constant": (
        schedules.Constant(peak=PEAK, warmup_steps=WARMUP, cooldown_steps=8),
        lambda s: PEAK * warmup(s) * min(1, (STEPS - s) / 8),
    ),
    "drops": (
        schedules.StepDrops(
            peak=PEAK, warmup_steps=WARMUP, drop_fractions=(0.25, 0.5, 0.9)
        ),
        lambda s: PEAK * warmup(s) * 0.1 ** ((s > 10) + (s > 20) + (s > 36)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_equals_its_formula_at_every_step(name):
    schedule, formula = CASES[name]
    expected = [formula(step) for step in range(STEPS)]
    # float32 cosines lose relative, not absolute, precision near the end.
    np.testing.assert_allclose(
        table(schedule, STEPS), expected, rtol=2e-6, atol=1e-7 * PEAK
    )


@pytest.mark.parametrize("name", CASES)
def test_one_step_an_array_of_steps_and_a_traced_step_agree(name):
    schedule, _ = CASES[name]
    learning_rate = schedule.build(STEPS)
    assert isinstance(schedule, types.Schedule)
    rows = table(schedule, STEPS)
    for step in (0, 1, WARMUP, 23, STEPS - 1):
        traced = jax.jit(learning_rate)(jnp.int32(step))
        assert traced.dtype == jnp.float32 and traced.shape == ()
        assert float(learning_rate(step)) == rows[step]
        # Compiled arithmetic may fuse; a unit in the last place.
        np.testing.assert_allclose(traced, rows[step], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_first_update_of_a_warm_up_has_rate_zero_and_the_peak_follows_it(name):
    schedule, _ = CASES[name]
    rows = table(schedule, STEPS)
    assert rows[0] == 0.0
    assert (np.diff(rows[: WARMUP + 1]) > 0).all()
    assert np.argmax(rows) == WARMUP


def test_without_warm_up_the_first_update_has_the_peak():
    for schedule in (
        schedules.WarmupCosine(peak=PEAK),
        schedules.WarmupLinear(peak=PEAK),
        schedules.WarmupRsqrt(peak=PEAK),
        schedules.Constant(peak=PEAK),
        schedules.StepDrops(peak=PEAK, drop_steps=(2,)),
    ):
        np.testing.assert_allclose(schedule.build(4)(0), PEAK, rtol=1e-7)


def test_cosine_and_linear_would_reach_zero_one_step_after_the_last():
    for schedule in (
        schedules.WarmupCosine(peak=1.0, warmup_steps=10),
        schedules.WarmupLinear(peak=1.0, warmup_steps=10),
        schedules.Constant(peak=1.0, cooldown_steps=10),
        schedules.WarmupRsqrt(peak=1.0, cooldown_steps=10),
    ):
        learning_rate = schedule.build(100)
        assert float(learning_rate(99)) > 0
        assert float(learning_rate(100)) == pytest.approx(0, abs=1e-7)
        assert float(learning_rate(101)) == pytest.approx(0, abs=1e-7)  # never below


def bit_paper_learning_rate(step, supports, base=0.003):
    if step < supports[0]:
        return base * step / supports[0]
    if step >= supports[-1]:
        return None
    for boundary in supports[1:]:
        if boundary < step:
            base /= 10
    return base


@pytest.mark.parametrize(
    ("num_examples", "steps"),
    [
        (1000, (100, 200, 300, 400, 500)),
        (19_999, (100, 200, 300, 400, 500)),
        (20_000, (500, 3000, 6000, 9000, 10_000)),
        (499_999, (500, 3000, 6000, 9000, 10_000)),
        (500_000, (500, 6000, 12_000, 18_000, 20_000)),
    ],
)
def test_bit_hyperrule_equals_its_loop_at_every_step(num_examples, steps):
    assert schedules.bit_hyperrule_steps(num_examples) == steps
    rows = table(schedules.bit_hyperrule(num_examples), steps[-1])
    expected = [bit_paper_learning_rate(step, steps) for step in range(steps[-1])]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


def test_a_drop_acts_from_the_step_after_it():
    rows = table(schedules.bit_hyperrule(1000, peak=0.001), 500)
    picked = rows[[0, 50, 100, 200, 201, 300, 301, 400, 401, 499]]
    expected = [0, 5e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    np.testing.assert_allclose(picked, expected, rtol=1e-6)


def test_bit_pretraining_drops_at_30_60_and_80_of_90_epochs():
    schedule = schedules.StepDrops(
        peak=0.48, warmup_steps=5, drop_fractions=(30 / 90, 60 / 90, 80 / 90)
    )
    by_steps = schedules.StepDrops(
        peak=0.48, warmup_steps=5, drop_steps=(300, 600, 800)
    )
    np.testing.assert_array_equal(table(schedule, 900), table(by_steps, 900))


def test_a_warm_up_that_does_not_fit_is_refused_with_the_numbers():
    schedule = schedules.WarmupCosine(peak=1e-3, warmup_steps=10_000)
    with pytest.raises(ValueError, match=r"warmup_steps=10000 .* 500 steps.* most 499"):
        schedule.build(500)
    schedule.build(10_001)
    both = schedules.Constant(peak=1e-3, warmup_steps=60, cooldown_steps=50)
    with pytest.raises(ValueError, match=r"warmup_steps=60 and .*cooldown_steps=50"):
        both.build(100)
    with pytest.raises(ValueError, match=r"drop_steps=\(3, 500\) go beyond .* 100"):
        schedules.StepDrops(peak=1.0, drop_steps=(3, 500)).build(100)
    with pytest.raises(ValueError, match="num_steps=0"):
        schedules.Constant(peak=1.0).build(0)
    assert float(schedules.Constant(peak=1.0).build(1)(0)) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.WarmupCosine(peak=0.0), r"peak=0.0 .*freeze="),
        (lambda: schedules.WarmupCosine(peak=float("nan")), "peak=nan"),
        (
            lambda: schedules.WarmupLinear(peak=1.0, end_fraction=2.0),
            "end_fraction=2.0 is a",
        ),
        (lambda: schedules.Constant(peak=1.0, warmup_steps=-1), "warmup_steps=-1"),
        (lambda: schedules.Constant(peak=1.0, cooldown_steps=-1), "cooldown_steps=-1"),
        (lambda: schedules.WarmupRsqrt(peak=1.0, timescale_steps=0), "timescale"),
        (lambda: schedules.StepDrops(peak=1.0), "exactly one"),
        (
            lambda: schedules.StepDrops(
                peak=1.0, drop_steps=(3,), drop_fractions=(0.5,)
            ),
            "exactly one",
        ),
        (lambda: schedules.StepDrops(peak=1.0, drop_steps=(5, 3)), r"use \(3, 5\)"),
        (
            lambda: schedules.StepDrops(peak=1.0, drop_fractions=(0.5, 300.0)),
            "steps go into drop_steps",
        ),
    ],
)
def test_values_that_make_no_schedule_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
