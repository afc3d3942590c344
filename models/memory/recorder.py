"""Record a function's GPU launches, to repeat them with one call.

A recording repeats the same kernels on the same addresses with the same numbers. Source: the CUDA
programming guide, "CUDA Graphs"; `torch.cuda.CUDAGraph`, whose graphs may share one pool of memory
where they are always repeated in the order in which they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Recorder(Protocol):
    """Records what a function launches."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run `body` where it will be recorded, so that what happens once happens now."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """What repeats the launches of `body`, which are not done now."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """As `Recorder` says; on a stream of its own, where cuBLAS then has its workspace."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            body()
        current.wait_stream(self.stream)

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """As `Recorder` says. Raises `RuntimeError` if `body` makes the host wait."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a tracker's, may go on using the device.
        mode = "thread_local"
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
            body()
        replay: Callable[[], None] = graph.replay
        return replay
