"""Time a call: CUDA events on a GPU, a clock elsewhere.

On a GPU every timed call starts with a cold second-level cache: a buffer larger than it is
overwritten first. The overwriting takes longer than the host needs to issue the call, so that the
events enclose the device's own work and no wait for the host; what the host needs is given apart.
Medians with the 20th and 80th percentile, as `triton.testing.do_bench` gives them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.memory.simulate.meter import MemoryMeter
from kernels.runtime.scratch import release

Call = Callable[[], object]
_LEAST, _MOST = 5, 200
_FLUSH_BYTES = 256 << 20
_MOST_FLUSHES = 64


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, 20th and 80th percentile, and the least of all.

    `host` is the host's time to issue one (on a CPU, all of it).
    """

    median: float
    p20: float
    p80: float
    host: float
    repeats: int
    least: float


def synchronize(device: torch.device) -> None:
    """Wait for the device's work, if it has any of its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear(device: torch.device) -> None:
    """Forget what an earlier measurement left, so that its memory is not counted here."""
    gc.collect()
    release()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(call: Call, device: torch.device, known: Iterable[Tensor] = ()) -> int:
    """The most bytes that a call holds at once beyond what was there before it.

    On a CPU what it writes into must be `known`.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    meter = MemoryMeter()
    meter.ignore(list(known))
    with meter:
        call()
    return meter.peak.bytes


def measure(
    call: Call, device: torch.device, *, budget: float = 0.2, before: Call | None = None
) -> Timing:
    """Time `call` for about `budget` seconds after a warm-up; `before` runs untimed each time.

    There are at least five timed calls, however long they take, and at most 200.
    """
    _once(call, before, device)
    _, first = _once(call, before, device)
    for _ in range(min(20, int(0.2 * budget / max(first, 1e-7)))):
        _once(call, before, device)
    issue, whole = _once(call, before, device)
    repeats = min(_MOST, max(_LEAST, int(budget / max(whole, 1e-7))))
    if device.type == "cuda":
        samples = _events(call, before, device, repeats, issue)
    else:
        samples = [_once(call, before, device)[1] for _ in range(repeats)]
    samples.sort()
    return Timing(
        median=_quantile(samples, 0.5),
        p20=_quantile(samples, 0.2),
        p80=_quantile(samples, 0.8),
        host=issue,
        repeats=repeats,
        least=samples[0],
    )


def _once(call: Call, before: Call | None, device: torch.device) -> tuple[float, float]:
    """Seconds until `call` returned, and until its work was done."""
    if before is not None:
        before()
    synchronize(device)
    start = time.perf_counter()
    call()
    issued = time.perf_counter() - start
    synchronize(device)
    return issued, time.perf_counter() - start


def _events(
    call: Call, before: Call | None, device: torch.device, repeats: int, issue: float
) -> list[float]:
    buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    flushes = _flushes(buffer, issue)
    pairs = []
    for _ in range(repeats):
        if before is not None:
            before()
        for _ in range(flushes):
            buffer.zero_()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _flushes(buffer: Tensor, issue: float) -> int:
    """How often the buffer must be overwritten to keep the device busy while a call is issued."""
    buffer.zero_()
    synchronize(buffer.device)
    start = time.perf_counter()
    for _ in range(8):
        buffer.zero_()
    synchronize(buffer.device)
    one = (time.perf_counter() - start) / 8
    return min(_MOST_FLUSHES, 1 + int(1.5 * issue / one))


def _quantile(ordered: list[float], share: float) -> float:
    rank = share * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
