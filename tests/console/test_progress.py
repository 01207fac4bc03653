"""What is shown is true: rates, waiting, time left, and one live line at most."""

import io
import time
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from big_vision_lite.console import progress as progress_lib
from big_vision_lite.console.progress import Progress
from big_vision_lite.console.tables import (
    format_line,
    format_scores,
    input_bound_message,
    score_tables,
)
from big_vision_lite.runs.session import StepsInFlight
from big_vision_lite.runtime.targets import peak_flops

RECORD = {
    "train/loss": 0.12345,
    "train/learning_rate": 1e-3,
    "train/gradient_norm": 0.5,
    "images_per_second": 8123.4,
    "data_wait": 0.034,
    "eta_seconds": 75.2,
}


class FakeTime:
    """A clock that moves only when told, so that shares are exact."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_lib.time, "perf_counter", lambda: self.now)

    def batches(self, seconds):
        while True:
            self.now += seconds
            yield {}


def plain(**arguments):
    console = Console(file=io.StringIO(), width=120)
    return Progress(console=console, **{"num_steps": 100, "batch_size": 8} | arguments)


def terminal(**arguments):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    return Progress(console=console, **{"num_steps": 100, "batch_size": 8} | arguments)


def text(progress):
    return progress._console.file.getvalue()


def test_steps_continue_after_those_already_done_up_to_the_last(monkeypatch):
    progress = plain()
    progress.begin(7)
    batches = iter("abcdef")
    steps = list(progress.watch(batches, until=10))
    assert steps == [(8, "a"), (9, "b"), (10, "c")]
    assert next(batches) == "d"  # no batch is taken in vain


def test_no_step_is_taken_when_all_are_done():
    progress = plain()
    progress.begin(100)
    assert list(progress.watch(iter("ab"), until=100)) == []


def test_rates_equal_those_counted_by_hand(monkeypatch):
    clock = FakeTime(monkeypatch)
    progress = plain()
    found = {}
    for step, _ in progress.watch(clock.batches(0.5), until=21):
        clock.now += 30.0 if step == 1 else 1.5  # the first step compiles
        if step in (1, 11, 21):
            found[step] = progress.rates(step)
    assert found[1] == {}
    for step in (11, 21):
        assert found[step]["images_per_second"] == pytest.approx(10 * 8 / (10 * 2.0))
        assert found[step]["data_wait"] == pytest.approx(0.25)
        assert found[step]["eta_seconds"] == pytest.approx((100 - step) * 2.0)
        assert "mfu" not in found[step]  # nobody knows the peak of this CPU


def test_pauses_count_for_the_time_left_and_not_for_the_speed(monkeypatch):
    clock = FakeTime(monkeypatch)
    progress = plain()
    for step, _ in progress.watch(clock.batches(0.0), until=11):
        clock.now += 1.0
        if step == 5:
            with progress.paused():
                clock.now += 90.0
    rates = progress.rates(11)
    assert rates["images_per_second"] == pytest.approx(8.0)
    assert rates["eta_seconds"] == pytest.approx(89 * 10.0)


def test_mfu_is_flops_over_the_peak_of_all_devices(monkeypatch):
    clock = FakeTime(monkeypatch)
    devices = [types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")]
    monkeypatch.setattr(progress_lib.jax, "devices", lambda: devices)
    monkeypatch.setattr(progress_lib.jax, "device_count", lambda: 8)
    progress = plain()
    progress.begin(0, flops_per_step=8 * 989.4e12)
    for _ in progress.watch(clock.batches(0.0), until=6):
        clock.now += 4.0
    assert progress.rates(6)["mfu"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("TPU v3", 61.5),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_data_sheet(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


def test_nobody_makes_a_peak_up():
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA GeForce RTX 9090") is None


@pytest.mark.slow  # it takes the time, so it wants a machine to itself
def test_waiting_while_the_device_computes_is_not_waiting_for_data():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.ones((256, 256))
    slow(x).block_until_ready()
    start = time.perf_counter()
    slow(x).block_until_ready()
    step_seconds = time.perf_counter() - start

    def batches(seconds):
        while True:
            time.sleep(seconds)
            yield {}

    def wait(data_seconds):
        progress = plain()
        with StepsInFlight() as flight:
            source = batches(data_seconds)
            for _ in progress.watch(source, 12, flight.idle_since):
                flight.add(slow(x))
        return progress.rates(12)["data_wait"]

    # Half a step for a batch: the device is never idle, though the host waits.
    assert wait(step_seconds / 2) < 0.2
    # Six steps' time for a batch: about five sixths of the time the device is idle.
    assert 0.5 < wait(6 * step_seconds) < 0.95


def test_at_most_two_steps_are_in_flight():
    clock = StepsInFlight()

    class Outputs:
        def __init__(self):
            self.done = False

        def block_until_ready(self):
            while not self.done:
                time.sleep(0.001)

    steps = [Outputs() for _ in range(3)]
    steps[0].done = True
    clock.add(steps[0])
    clock.add(steps[1])  # returns: nothing but steps 1 and 2 may be running
    assert clock.idle_since(0.0) == pytest.approx(time.perf_counter(), abs=0.5)
    for outputs in steps:
        outputs.done = True
    clock.add(steps[2])
    clock.close()


@pytest.mark.slow  # it takes the time, so it wants a machine to itself
def test_a_step_costs_python_less_than_100_microseconds():
    progress = plain(num_steps=10_000)
    outputs = {"loss": jnp.ones(())}
    source = iter(range(10_000))
    seconds = []
    for _ in range(5):  # CPU time, the best of five: the machine is shared
        start = time.process_time()
        with StepsInFlight() as flight:
            for step, _ in progress.watch(source, progress._step + 1000):
                flight.add(outputs)
                if step % 50 == 0:
                    progress.show(step, RECORD | progress.rates(step))
        seconds.append((time.process_time() - start) / 1000)
    assert min(seconds) < 100e-6


def test_without_a_terminal_every_record_is_one_short_line():
    progress = plain()
    with progress:
        progress.show(5, RECORD)
        progress.show(100, RECORD | {"mfu": 0.41})
    lines = text(progress).splitlines()
    assert lines == [
        "step   5/100  loss 0.1235  lr 1.00e-03  grad 0.5  8,123 img/s  wait 3%  "
        "eta 0:01:15",
        "step 100/100  loss 0.1235  lr 1.00e-03  grad 0.5  8,123 img/s  wait 3%  "
        "mfu 41.0%  eta 0:01:15",
    ]
    assert lines[0] == format_line(5, 100, RECORD)


def test_a_narrow_terminal_shows_the_time_left_and_drops_what_matters_less():
    full = RECORD | {"train/accuracy": 0.983, "mfu": 0.41}
    narrow = format_line(5000, 100_000, full, 80)
    assert len(narrow) <= 80
    for part in ("step   5000/100000", "loss 0.1235", "8,123 img/s", "eta 0:01:15"):
        assert part in narrow
    assert "grad" not in narrow
    for columns in range(20, 140):
        line = format_line(5, 100, full, columns)
        assert "step   5/100" in line and "eta" in line
        assert len(line) <= max(columns, len("step   5/100  eta 0:01:15"))
    assert format_line(5, 100, full, 140) == format_line(5, 100, full)
    # And the live line does so.
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(100_000, 8, console=console) as progress:
        progress.show(5, full)
    assert "eta 0:01:15" in text(progress) and "…" not in text(progress)


def test_on_a_terminal_messages_stay_above_the_live_line():
    progress = terminal()
    with progress:
        progress.show(5, RECORD)
        progress.message("kept [bold] text")
        progress.show(6, RECORD)
    shown = text(progress)
    assert "loss 0.1235" in shown and "8,123 img/s" in shown
    assert shown.index("step   0/100") < shown.index("kept [bold] text")


@pytest.mark.parametrize("make", [plain, terminal])
def test_a_run_inside_a_run_shows_itself_through_the_outer_one(make):
    outer = make()
    with outer:
        outer.show(5, RECORD)
        # As a fine-tuning evaluator does: it knows nothing of the outer run.
        with Progress(20, 4) as inner:
            for step, _ in inner.watch(iter(range(20)), until=2):
                inner.show(step, {"train/loss": 7.5})
            inner.message("two\nlines")
            inner.summary({"test/accuracy": 0.5}, ["type this"])
        outer.show(6, RECORD)
    shown = text(outer)
    assert "  two" in shown and "  lines" in shown
    assert "type this" not in shown
    assert ("step  2/20  loss 7.5000" in shown) == (make is terminal)
    assert Progress(10, 1)._outer is None


def test_a_quiet_run_prints_nothing():
    for progress in (plain(quiet=True), terminal(quiet=True)):
        with progress:
            progress.begin(3)
            progress.show(5, RECORD)
            progress.scores(5, {"test/accuracy": 0.5})
            progress.message("text")
        progress.summary({"test/accuracy": 0.5}, ["next"])
        assert text(progress) == ""


def test_the_line_is_gone_after_an_error():
    progress = terminal()
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert progress._live is None and Progress(10, 1)._outer is None


FEW_SHOT = {
    "fewshot/digits/10_shot/accuracy": 0.9012,
    "fewshot/digits/10_shot/accuracy_sd": 0.006,
    "fewshot/digits/10_shot/accuracy_l2_chosen": 0.91,
    "fewshot/digits/10_shot/accuracy_l2_chosen_sd": 0.004,
    "fewshot/digits/10_shot/l2_chosen": 64.0,
    "fewshot/digits/10_shot/control_raw_pixels": 0.829,
    "fewshot/digits/10_shot/control_raw_pixels_sd": 0.017,
    "fewshot/digits/10_shot/control_raw_pixels_l2_chosen": 0.84,
    "fewshot/digits/10_shot/l2_chosen_control_raw_pixels": 1024.0,
    "fewshot/digits/10_shot/control_untrained": 0.551,
    "fewshot/digits/10_shot/control_untrained_sd": 0.02,
    "fewshot/digits/10_shot/control_untrained_l2_chosen": 0.61,
}


def test_scores_carry_their_spread():
    found = format_scores(FEW_SHOT)
    assert found["fewshot/digits/10_shot/accuracy"] == "90.1 ± 0.6 %"
    assert found["fewshot/digits/10_shot/l2_chosen"] == "64"
    assert not [name for name in found if name.endswith("_sd")]
    others = {"test/loss": 0.08123, "test/examples": 10_000.0, "test/unreadable": 0.0}
    assert format_scores(others) == {"test/loss": "0.08123", "test/examples": "10,000"}


def test_the_summary_puts_the_controls_beside_the_scores_and_says_what_to_type_next():
    progress = plain()
    progress.summary(FEW_SHOT | {"test/accuracy": 0.985}, ["python -m x [y]"])
    shown = text(progress)
    lines = shown.splitlines()
    fixed, chosen = (x for x in lines if "fewshot/digits/10_shot" in x)
    assert "l2 chosen" in chosen
    for row, cells in (
        (fixed, ("90.1 ± 0.6", "82.9 ± 1.7", "55.1 ± 2.0")),
        (chosen, ("91.0 ± 0.4", "84.0", "61.0")),
    ):
        assert sorted(cells, key=row.index) == list(cells)
    header = next(x for x in lines if "raw pixels" in x)
    order = ("accuracy", "raw pixels", "untrained")
    assert sorted(order, key=header.index) == list(order)
    assert "98.5 %" in next(x for x in lines if "test" in x and "10_shot" not in x)
    assert max(map(len, lines)) <= 80, "fits a terminal"
    assert "Next:\n  python -m x [y]" in shown


@pytest.mark.parametrize(
    "leaf, shown",
    [
        ("accuracy", "87.2 %"),
        ("mean_per_class_accuracy", "87.2 %"),
        ("macro_recall", "87.2 %"),
        ("precision", "87.2 %"),
        ("accuracy_top5", "87.2 %"),
        ("accuracy_l2_chosen", "87.2 %"),
        ("accuracy_gap", "0.8715"),
        ("recalled_words", "0.8715"),
        ("mean_iou", "0.8715"),
    ],
)
def test_the_last_word_of_a_score_is_its_unit(leaf, shown):
    assert format_scores({f"mine/{leaf}": 0.8715}) == {f"mine/{leaf}": shown}


def test_a_control_has_the_unit_of_what_it_stands_beside():
    scores = {"mine/error": 0.5, "mine/control_constant": 0.75}
    assert format_scores(scores)["mine/control_constant"] == "0.75"
    assert "in %" not in score_tables(scores)[0]


@pytest.mark.parametrize("columns", [10, 40, 60, 80, 200, None])
def test_a_table_of_any_width_holds_every_figure_whole(columns):
    """On a terminal it stacks; in a pipe it is as wide as it needs."""
    scores = FEW_SHOT | {f"a_long_name_of_a_set/{n}_accuracy": 0.839 for n in "abcdef"}
    figures = ("90.1 ± 0.6", "82.9 ± 1.7", "55.1 ± 2.0", "91.0 ± 0.4", "61.0")
    console = Console(
        file=io.StringIO(),
        width=columns or 20,
        force_terminal=columns is not None,
        color_system=None,
    )
    progress = Progress(100, 8, console=console)
    progress.summary(scores, [])
    shown = text(progress)
    assert all(shown.count(figure) == 1 for figure in figures)
    assert shown.count("83.9 %") == 6 and "…" not in shown
    lines = shown.splitlines()
    if columns in (40, 60, 80, 200):
        assert max(map(len, lines)) <= columns
    together = any("90.1 ± 0.6" in x and "82.9 ± 1.7" in x for x in lines)
    assert together == (columns in (80, 200, None))


def test_an_evaluation_is_shown_in_one_line_without_its_controls():
    progress = plain()
    progress.scores(40, FEW_SHOT | {"test/accuracy": 0.985, "test/loss": 0.05})
    assert text(progress).splitlines() == [
        "step 40  fewshot/digits/10_shot  accuracy 90.1 ± 0.6 %  "
        "accuracy_l2_chosen 91.0 ± 0.4 %",
        "step 40  test  accuracy 98.5 %  loss 0.05",
    ]


STAGES = {"read": (0.5, 1000), "Decode": (3.1, 1000), "FlipLeftRight": (0.0, 0)}


def test_an_input_bound_run_is_told_the_slowest_stage_and_what_to_type():
    assert input_bound_message(0.43, 200, STAGES, threads=8, cores=24) == (
        "Input-bound: 43% of the last 200 steps was waiting for data. Slowest stage: "
        "Decode (3.1 ms/img, 8 threads). 16 of 24 cores are free: "
        "--config.data.threads=24"
    )
    full = input_bound_message(0.43, 200, {}, threads=8, cores=8)
    assert full is not None and "All 8 cores are taken" in full
    assert input_bound_message(0.2, 200, STAGES, threads=8, cores=24) is None


@pytest.mark.parametrize("wait_seconds, told", [(2.0, 1), (0.1, 0)])
def test_a_run_says_once_that_it_is_input_bound(monkeypatch, wait_seconds, told):
    clock = FakeTime(monkeypatch)
    progress = plain(num_steps=1000)
    batches = types.SimpleNamespace(threads=2, stages=lambda: STAGES)
    for step, _ in progress.watch(clock.batches(wait_seconds), until=400):
        clock.now += 1.0
        if step % 20 == 0:
            progress.show(step, progress.rates(step), batches)
    assert text(progress).count("Input-bound: 67% of the last 1") == told
    assert text(progress).count("Input-bound") == told


def test_an_objective_s_own_metrics_end_the_line_and_are_dropped_first():
    metrics = {"train/loss": 0.5, "train/feature_sd": 0.25, "images_per_second": 9.0}
    whole = format_line(3, 10, metrics)
    assert whole == "step  3/10  loss 0.5000  9 img/s  feature sd 0.25"
    narrow = format_line(3, 10, metrics, columns=len(whole) - 1)
    assert narrow == "step  3/10  loss 0.5000  9 img/s"
