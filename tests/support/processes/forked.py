"""Work in a child that was forked, with all that its parent has loaded."""

import os
import traceback
from collections.abc import Callable

import torch


def forked(work: Callable[[], object]) -> int:
    """Start `work` in a child; returns the child's number.

    It ends with the status that `work` returns, or exits with, as a number; else with 0, or with 70
    and a traceback if `work` fails. torch has one thread there: those of the parent are not forked.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        torch.set_num_threads(1)
        told = work()
        status = told if isinstance(told, int) else 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """The exit status of a child, once it ended; minus the number of a signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
