"""What code does while a simulation answers for the machine, and that it does it in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.runtime import device
from kernels.runtime.host_memory import copy_stream, host_copy
from kernels.runtime.simulation import (
    SimulatedGPU,
    equal_parts,
    once_per_shape,
    simulate_with,
    simulation,
)
from kernels.runtime.triton_support import launch

GPU = SimulatedGPU(torch.device("cuda", 99), architecture=90, multiprocessors=132)


class Recording:
    """A simulation that notes what it is asked."""

    gpu = GPU

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self.operations = 0.0

    def once(self, key: Hashable, run: Callable[[], Any], result: Callable[[], Any]) -> Any:
        first = key not in self.keys
        self.keys.append(key)
        return run() if first else result()

    def some(self, parts: Sequence[Any]) -> Iterator[Any]:
        return iter(parts[:1])

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        self.operations += operations
        return lambda *args, **options: None

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def stays_on_host(self, tensor: Tensor) -> None: ...

    def shapes_only(self) -> AbstractContextManager[Any]:
        return nullcontext()


class Kernel:
    """Stands for a Triton kernel."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((grid, args, options))


def test_a_kernel_is_launched_but_not_in_a_simulation() -> None:
    kernel, recording = Kernel(), Recording()
    launch(kernel, (2, 3), 8.0)(1, BLOCK=4)
    assert kernel.launches == [((2, 3), (1,), {"BLOCK": 4})]
    with simulate_with(recording):
        launch(kernel, (2, 3), 8.0)(1, BLOCK=4)
    assert len(kernel.launches) == 1
    assert recording.operations == 8.0


def test_a_simulated_gpu_answers_in_its_own_thread_alone() -> None:
    cpu = torch.device("cpu")
    with simulate_with(Recording()):
        assert device.current_index() == 99
        assert (device.architecture(cpu), device.multiprocessors(cpu)) == (90, 132)
        assert not device.has_streams(torch.device("cuda", 0))
        assert copy_stream(torch.device("cuda", 0)) is None
        seen: list[object] = []
        thread = threading.Thread(
            target=lambda: seen.extend((simulation(), device.architecture(cpu)))
        )
        thread.start()
        thread.join()
        assert seen == [None, 80]
    assert simulation() is None
    assert device.architecture(cpu) == 80


def test_a_simulation_ends_with_an_error_inside() -> None:
    with pytest.raises(ValueError, match="inside"), simulate_with(Recording()):
        raise ValueError("inside")
    assert simulation() is None


def test_an_op_of_many_parts_runs_once_for_each_shape() -> None:
    runs: list[int] = []

    @once_per_shape(lambda x: x.shape, torch.zeros_like)
    def op(x: Tensor) -> Tensor:
        """Twice x."""
        runs.extend(equal_parts(range(4)))
        return x * 2

    x = torch.ones(3)
    assert torch.equal(op(x), 2 * x)
    assert torch.equal(op(x), 2 * x)
    assert runs == [0, 1, 2, 3] * 2
    runs.clear()
    with simulate_with(Recording()):
        assert torch.equal(op(x), 2 * x)
        assert torch.equal(op(x), torch.zeros(3))
        assert op(torch.ones(5)).shape == (5,)
    assert runs == [0, 0]
    assert op.__doc__ == "Twice x."


def test_copies_to_the_host_are_the_simulations() -> None:
    x = torch.arange(6.0).view(2, 3)
    with simulate_with(Recording()):
        assert torch.equal(host_copy(x, torch.float64), x.double())
