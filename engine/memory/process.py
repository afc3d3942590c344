"""What a process holds before a model: Python, torch, libraries.

On a CPU a memory budget is a wall around the whole process, so its own bytes count beside those of
tensors. A plan for another process takes `PROCESS`. A run looks once, before weights are read, and
at what was resident at most after every step.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from engine.errors import gib

PROCESS = 520 * 2**20
"""Bytes of a process on a CPU besides a run's tensors: 316 MiB once all is imported, 470 MiB once
rows are read and planned, and what the libraries of matrix products keep for their threads. It is
assumed, from runs of SmolLM2-135M with torch 2 on Linux x86-64 with two threads."""


def process_bytes(device: torch.device) -> int:
    """What this process holds or will hold besides tensors to come; 0 of a GPU's memory.

    What is resident now, but at least `PROCESS`: a young process has not grown to it yet.
    """
    if device.type != "cpu":
        return 0
    return max(PROCESS, int(psutil.Process().memory_info().rss))


def forget_peak() -> None:
    """Let `peak_resident` begin anew; Linux alone can, and not in every container."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most bytes of this process that were resident at once, since `forget_peak` on Linux.

    Elsewhere what is resident now. Source: proc(5), VmHWM.
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return int(psutil.Process().memory_info().rss)


def refusal(budget: int, process: int) -> str:
    """One paragraph for a `budget` that does not even hold the process, which takes `process`."""
    known = "is assumed to take" if process == PROCESS else "takes"
    least = -(-process // 2**20)
    return (
        f"A memory budget of {gib(budget)} is less than the process itself {known} on a CPU before "
        f"it holds a model: {gib(process)} for Python, torch and libraries. The budget is for all "
        f"that is resident. Give more than --memory-budget {least}MiB; `engine plan --device cpu` "
        "with the same settings and without a budget says how much."
    )
