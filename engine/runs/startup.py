"""Prepare the process: quiet threads, growing CUDA segments, imports without garbage collection.

torch and its compiler make millions of objects as they are imported, none of them garbage, and
Python's collector goes over them again and again: that is a fifth of the time they take. At the end
it goes over all of them once more, before a process gives its memory back in one piece anyway.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WAIT = "OMP_WAIT_POLICY"
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The variable of torch's CUDA allocator, and its name from torch 2.9 on; both are read."""


def wait_quietly() -> None:
    """Let OpenMP's threads sleep while they wait, if torch is not there yet to have read this.

    Threads that wait by spinning take the cores from those that work wherever another program runs
    too: on a busy machine a step took five times as long. On an idle one both are equally fast.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault(_WAIT, "PASSIVE")


def let_segments_grow() -> None:
    """Let torch's CUDA allocator enlarge its segments, unless the user has configured it.

    Rows of many lengths leave fewer holes that way. It is read before the first CUDA allocation.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def spinning_advice() -> str | None:
    """What to say where torch was imported before `engine` and read no such setting; else None."""
    if os.environ.get(_WAIT):
        return None
    return (
        "torch was imported before engine, so its threads spin while they wait, which is slow "
        "beside other programs: import engine first, or start Python with OMP_WAIT_POLICY=PASSIVE"
    )


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
