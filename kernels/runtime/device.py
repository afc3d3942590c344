"""What a GPU is, asked in one place.

Every question is answered by the machine, or by the GPU that the calling thread simulates
(`kernels.runtime.simulation`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from kernels.runtime.simulation import simulated_gpu, simulation


def current_index() -> int:
    """The number of the current CUDA device."""
    gpu = simulated_gpu()
    return torch.cuda.current_device() if gpu is None else gpu.device.index


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as major * 10 + minor; 80 for the interpreter's CPU."""
    gpu = simulated_gpu()
    return _properties(device)[0] if gpu is None else gpu.architecture


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has; 1 for the interpreter's CPU."""
    gpu = simulated_gpu()
    return _properties(device)[1] if gpu is None else gpu.multiprocessors


def total_memory(device: torch.device) -> int:
    """Bytes of a CUDA device."""
    return _properties(device)[2]


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody uses."""
    return int(torch.cuda.mem_get_info(device)[0])


@cache
def _properties(device: torch.device) -> tuple[int, int, int]:
    if device.type != "cuda":
        return 80, 1, 0
    known = torch.cuda.get_device_properties(device)
    return known.major * 10 + known.minor, known.multi_processor_count, known.total_memory


def has_streams(device: torch.device) -> bool:
    """Whether work on the device can be queued on several streams."""
    return device.type == "cuda" and simulation() is None


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. The host does not wait: a GPU fetches it from pinned memory."""
    if has_streams(device):
        # The pinned memory is given back when the copy is done: torch's allocator sees to that.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def recording(device: torch.device) -> bool:
    """Whether launches of this thread are recorded for a graph, so that nothing may be waited for.

    False in a simulated step.
    """
    return has_streams(device) and torch.cuda.is_current_stream_capturing()


def seconds(run: Callable[[], None], device: torch.device, repeats: int = 3) -> float:
    """The shortest time that `run` takes on the device, after one run to warm up. The host waits.

    On a GPU it is measured between events, from the first launch of `run` to the end of its last.
    """
    run()
    if not has_streams(device):
        return min(_on_host(run) for _ in range(repeats))
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        marks[-1].synchronize()
    return min(float(a.elapsed_time(b)) for a, b in pairwise(marks)) / 1e3


def _on_host(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
