"""Stop a run by a signal: finish the step, checkpoint, exit.

The first SIGINT, SIGTERM or SIGHUP only sets a flag that the training loop reads at the end of a
step, because there alone a state exists that can be saved whole. The second one ends the process at
once: a checkpoint that is being written is then simply never published. SIGHUP stays ignored where
it was (under `nohup`).
"""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self

log = logging.getLogger(__name__)

PASSED_ON = 5.0
"""Seconds in which a launcher has passed on a signal that its processes may have had already."""

PASSES_ON = "ENGINE_PASSES_SIGNALS_ON"
"""Is in the environment of a process whose parent passes on the signals that it gets."""

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(SystemExit):
    """The run was asked to stop and did, after a checkpoint. The exit status is 128 + signal.

    A child of `SystemExit`: no `except Exception` on the way holds it up, and a script that does
    not catch it ends with the right status.
    """

    def __init__(self, number: int, message: str = "", step: int | None = None) -> None:
        super().__init__(128 + number)
        self.number, self.step = number, step
        self.message = message or f"Stopped by {signal.Signals(number).name}."

    def facts(self) -> dict[str, Any]:
        """For a run's summary: the signal, and the step whose checkpoint was written, or None."""
        return {"signal": signal.Signals(self.number).name, "step": self.step}

    def __str__(self) -> str:
        return self.message


class RaiseOnTerminate:
    """A context in which SIGTERM and SIGHUP raise `Interrupted`, as SIGINT does its own exception.

    For the parts of a run that no checkpoint covers (loading, evaluating): without it the process
    would vanish and leave no summary. Handlers that somebody else has set are left alone.
    """

    def __init__(self) -> None:
        self._changed: list[int] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES[1:]:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _raise)
                    self._changed.append(number)
        return self

    def __exit__(self, *raised: object) -> None:
        for number in self._changed:
            signal.signal(number, signal.SIG_DFL)
        self._changed.clear()


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def are_passed_on() -> bool:
    """Whether a parent passes on its signals, which may have been sent to this process too."""
    return PASSES_ON in os.environ


class PassedOn:
    """A context in which signals that ask to stop are left to a process that was started.

    SIGTERM and SIGHUP, which may reach this process alone, are passed on; of an interrupt the
    terminal tells both. This process waits for the end of the other, which may have a step to
    finish and a checkpoint to write; a second signal ends it at once.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            with suppress(OSError):
                os.kill(self._pid, number)
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class StopSignals:
    """A context in which signals ask for a stop instead of ending the process.

    Signals within `together` seconds of the first count as it: a scheduler that signals every
    process of a job, and a launcher that passes its own on, send one process the same twice.
    Outside the main thread Python allows no handlers; there the context only offers `request`.
    """

    def __init__(self, together: float = 0.0) -> None:
        self._together, self._first = together, 0.0
        self._number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> int | None:
        """The signal that asked for a stop, or None."""
        return self._number

    def request(self, number: int) -> None:
        """Ask for a stop as the signal `number` would."""
        self._number = number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None and time.monotonic() - self._first < self._together:
            return
        if self._number is not None:
            # Nothing that could wait (a lock, a full pipe) may stand between here and the end.
            os._exit(128 + number)
        self._number, self._first = number, time.monotonic()
        # Not through logging: its locks may be held by the very code that this interrupts.
        text = (
            f"\n{signal.Signals(number).name}: writing a checkpoint after this step; "
            "the same again stops at once.\n"
        )
        try:
            os.write(2, text.encode())
        except OSError:
            return  # a closed terminal must not keep the run from stopping well

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            log.debug("not in the main thread: signals keep their meaning")
            return self
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
