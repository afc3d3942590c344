"""Standard streams that are open and can show any text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from pathlib import Path


@contextmanager
def open_streams() -> Iterator[None]:
    """Inside the block all three streams are open, and write what a terminal lacks as escapes.

    A closed stream (`>&-`) leaves its number to the next file that is opened, which would then
    receive all that is printed. A terminal of another encoding than UTF-8 lacks characters that
    help, answers and file names hold.
    """
    for number in range(3):
        _open_nothing(number)
    with ExitStack() as stack:
        if sys.stdout is None:
            stack.enter_context(redirect_stdout(stack.enter_context(_nowhere())))
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(stack.enter_context(_nowhere())))
        if sys.stdin is None:
            nothing = stack.enter_context(Path(os.devnull).open(encoding="utf-8"))
            stack.enter_context(_StandardInput(nothing))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if isinstance(sys.stdin, TextIOWrapper):  # who reads a text tells which byte is none
            sys.stdin.reconfigure(errors="surrogateescape")
        yield


class _StandardInput(redirect_stdout[TextIOWrapper]):
    """Inside the block another file is standard input."""

    _stream = "stdin"


def _nowhere() -> TextIOWrapper:
    return Path(os.devnull).open("w", encoding="utf-8")


def _open_nothing(number: int) -> None:
    """Let the null device take a number of the three that is not in use."""
    try:
        os.fstat(number)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
