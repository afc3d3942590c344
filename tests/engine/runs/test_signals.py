"""A signal asks for a stop at the end of the step; a second one ends the process at once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.runs.signals import Interrupted, PassedOn, StopSignals

ROOT = Path(__file__).parents[3]

# A loop of steps that takes signals as the trainer does and tells what it does.
LOOP = """
import sys, time
from engine.runs.signals import Interrupted, StopSignals

with StopSignals() as stop:
    print("ready", flush=True)
    for step in range(200):
        time.sleep(float(sys.argv[1]))
        if stop.requested is not None:
            print("checkpoint", flush=True)
            raise Interrupted(stop.requested, "stopped as asked")
print("end", flush=True)
"""


def loop(seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_signal_lets_the_step_end_and_the_checkpoint_be_written(
    number: signal.Signals, status: int
) -> None:
    process = loop(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out == "checkpoint\n"
    assert number.name in err


def test_the_second_signal_ends_the_process_at_once() -> None:
    process = loop(30)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "stops at once" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""


def test_signals_that_come_together_are_one(capfd: pytest.CaptureFixture[str]) -> None:
    """A scheduler that signals all processes, and the launcher that passes its own on."""
    with StopSignals(together=60.0) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.requested == signal.SIGTERM
    assert capfd.readouterr().err.count("writing a checkpoint") == 1


@pytest.mark.parametrize(
    ("number", "alone"),
    [(signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGINT, False)],
)
def test_a_process_that_was_started_ends_before_the_one_that_waits(
    number: signal.Signals, alone: bool
) -> None:
    """Of an interrupt the terminal tells it itself; a second one would end it at once."""
    child = subprocess.Popen(["sleep", "60"])
    with PassedOn(child.pid) as signals:
        os.kill(os.getpid(), number)
        assert signals.number == number
        if not alone:
            child.kill()
        assert child.wait(20) == -(number if alone else signal.SIGKILL)


def test_a_run_under_nohup_ignores_the_hang_up() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "SIGTERM" in capfd.readouterr().err


def test_outside_the_main_thread_a_stop_can_still_be_asked_for() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with StopSignals() as stop:
            stop.request(signal.SIGTERM)
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIGTERM]


def test_an_interruption_is_an_exit_status_that_no_handler_of_errors_takes() -> None:
    error = Interrupted(signal.SIGTERM, "stopped")
    assert error.code == 143
    assert str(error) == "stopped"
    assert not isinstance(error, Exception)
