import os
import signal
import threading

import pytest

from big_vision_lite.recipes import command_line
from big_vision_lite.runtime.processes import Stopped, StopSignal


def handlers():
    return [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = handlers()
    yield
    assert handlers() == before


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_program_goes_on(number):
    with StopSignal() as stop:
        assert stop.requested() is None and not stop.agreed(1)
        send(number)
        assert stop.requested() == number.name
        assert stop.agreed(2) and stop.agreed(3)
    assert stop.requested() == number.name


def test_the_first_signal_is_answered_at_once_and_the_others_are_not(capfd):
    with StopSignal() as stop:
        send(signal.SIGINT)  # during start-up: no step was made
        said = capfd.readouterr().err
        assert said.startswith("\nSIGINT: finishing the first step and saving; ")
        assert said.endswith("Ctrl-C again leaves at once\n")
        send(signal.SIGTERM)
        assert capfd.readouterr().err == "" and stop.agreed(8)
    with StopSignal() as stop:
        stop.agreed(8)
        send(signal.SIGTERM)
        said = capfd.readouterr().err
        assert "SIGTERM: finishing step 9 and saving; Ctrl-C leaves at once" in said


def test_several_processes_ask_each_other_every_few_seconds(monkeypatch, capfd):
    """At steps that all know, however seldom the run writes a line of its log."""
    now, asked, answers = [0.0], [], [(0.0, 2.0), (0.0, 1.0), (1.0, 0.5)]

    def gather(*values):
        asked.append(values)
        return [values, answers[len(asked) - 1]]

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("big_vision_lite.runtime.processes.gather", gather)
    with StopSignal() as stop:
        monkeypatch.setattr(
            "big_vision_lite.runtime.processes.time.monotonic", lambda: now[0]
        )
        stop._asked = (0, 0.0)
        stopped_at = []
        for step in range(1, 20):
            now[0] += 1.0  # ours take a second, the other's two at first
            if stop.agreed(step):
                stopped_at.append(step)
                break
            if step == 2:
                send(signal.SIGTERM)
                said = capfd.readouterr().err
                assert "until all processes have heard of it, and saving" in said
    # At 1; 5 s at 2 s a step later, where ours is told; the other had said nothing.
    assert asked[:2] == [(False, 1.0), (True, 1.0)] and stopped_at == [3]


def test_several_sigterms_are_one():
    with StopSignal() as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts_at_once(first):
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        send(first)
        assert stop.requested() is not None
        send(signal.SIGINT)
        pytest.fail("the interrupt did not come")


def test_outside_of_it_a_signal_does_what_it_did():
    # Jobs in the background of a shell are started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignal():
        pass
    try:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_inside_a_run_stops_with_it():
    with StopSignal() as outer:
        with StopSignal() as inner:
            assert inner.requested() is None
            send(signal.SIGTERM)
            assert inner.agreed(1) and inner.requested() == "SIGTERM"
        assert outer.agreed(1)
        # The next inner run (another evaluator's) does not begin as if nothing was.
        with StopSignal() as another:
            assert another.requested() == "SIGTERM"
    with StopSignal() as later:
        assert later.requested() is None


def test_handlers_come_back_when_the_run_fails():
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopSignal(), StopSignal():
        assert handlers() != before
        1 / 0  # noqa: B018
    assert handlers() == before


def test_a_run_outside_the_main_thread_works_without_signals():
    found = []

    def run():
        with StopSignal() as stop:
            found.append(stop.requested())

    before = handlers()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None] and handlers() == before


def test_a_stopped_run_says_what_is_saved_and_exits_like_a_signal(capsys):
    stopped = Stopped("SIGTERM", 40, "runs/x")
    assert "SIGTERM: saved step 40 in runs/x. The same command continues" in str(
        stopped
    )
    assert stopped.exit_code == 143 and Stopped("SIGINT", 1, "x").exit_code == 130
    # Another process got the signal.
    assert Stopped(None, 1, "x").exit_code == 143
    assert "Another process: saved step 1" in str(Stopped(None, 1, "x"))

    def main(argv):
        raise stopped

    assert command_line.run(main, ["train"]) == 143
    assert "saved step 40" in capsys.readouterr().out


def test_an_interrupt_ends_without_a_trace(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert command_line.run(main, ["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err
