"""Disable Python's garbage collector while torch is imported and at exit.

torch and its compiler make millions of objects as they are imported, none of them garbage, and
Python's collector goes over them again and again: that is a fifth of the time they take. At the end
it goes over all of them once more, before a process gives its memory back in one piece anyway.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Disable the garbage collector inside the block and restore it afterwards."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def leave_quickly() -> None:
    """Let the process end without a last look at everything it holds."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
