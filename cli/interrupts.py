"""Ctrl-C ends the program with one line, at any moment.

Python turns the signal into an exception wherever the program happens to be. In the middle of an
import that leaves half a module and a traceback, and in a callback or a destructor it is printed
and forgotten. So while the program only imports, the signal ends the process; while it works, the
exception is raised, for who has something to save; and where it got lost the process ends all the
same, some seconds later or at the second Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_VERBS = os.path.join("engine", "verbs", "")  # noqa: PTH118
_TORCH = f"{os.sep}torch{os.sep}"
_LINE = b"engine: Stopped.\n"
_PATIENCE = 5.0
"""Seconds that a program may take to put things in order."""


class Interrupts:
    """The handler of SIGINT, of which a process has one."""

    def __init__(self) -> None:
        self._working = False
        self._seen = False
        self._installed = False

    def install(self) -> None:
        """Take Python's own handler's place; one that somebody else set, or none, stays."""
        if not self._installed and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)
            self._installed = True

    @property
    def seen(self) -> bool:
        """Whether the signal came while the program worked, even if nobody took the exception."""
        return self._seen

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the block the signal raises `KeyboardInterrupt`, as Python's own handler does."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def _interrupted(self, number: int, frame: Any) -> None:
        if not self._working or self._seen or _is_importing(frame):
            leave()
        self._seen = True
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: leave())
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        raise KeyboardInterrupt


INTERRUPTS = Interrupts()


def leave() -> NoReturn:
    """End the process with its one line; nothing waits, nothing is flushed."""
    try:
        os.write(2, _LINE)
    finally:
        os._exit(130)  # Also where nobody reads the line any more.


def _is_importing(frame: Any) -> bool:
    """Whether a module is being imported on the way to `frame`, and no verb is at work yet.

    While torch itself is imported none has done anything, and an exception in the C++ that imports
    parts of it would abort the process.
    """
    imports = False
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and _TORCH in code.co_filename:
            return True
        if code.co_name != "<module>" and _VERBS in code.co_filename:
            return False
        imports = imports or code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return imports


def is_program() -> bool:
    """Whether this process was started as the command line, and not by who imports it."""
    return sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith("engine")  # noqa: PTH119
