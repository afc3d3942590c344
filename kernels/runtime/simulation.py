"""Seams through which a simulated step answers in place of the machine.

A simulated step runs the training code on tensors without memory (`engine.memory.simulate`). Code
that would do real work, or ask what machine this is, asks here whether it is simulated. The answer
is a context variable: it holds in the thread that simulates, autograd's backward on that thread
included, and nowhere else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Scoped(Generic[T]):
    """A value that is set for a block of code, in the thread that runs it alone."""

    def __init__(self, name: str, default: T) -> None:
        self._variable: ContextVar[T] = ContextVar(name, default=default)
        self.get: Callable[[], T] = self._variable.get

    @contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Set the value inside the block."""
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)


@dataclass(frozen=True)
class SimulatedGPU:
    """The GPU that a simulation assumes. `attention` names the back ends that work on it.

    Where it `repeats`, the run is in torch's deterministic mode. `multiplies_groups` says whether
    torch's grouped product of matrices may be called on it.
    """

    device: torch.device
    architecture: int = 80
    multiprocessors: int = 108
    attention: tuple[str, ...] = ("flash", "documents")
    multiplies_into_fp32: bool = True
    repeats: bool = False
    multiplies_groups: bool = True


class Simulation(Protocol):
    """What answers for the machine while a step is simulated. `gpu` is None for a CPU."""

    @property
    def gpu(self) -> SimulatedGPU | None: ...

    def once(self, key: Hashable, run: Callable[[], R], result: Callable[[], R]) -> R:
        """`run()` for the first of each key; for later ones `result()`, which is like it."""

    def some(self, parts: Sequence[T]) -> Iterator[T]:
        """Enough of many equal parts to meet all the memory that they take."""

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        """What is called in place of a launch of a Triton kernel, which does so many operations."""

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> Tensor:
        """A tensor that lies in the host's memory and takes `taken` bytes of it."""

    def stays_on_host(self, tensor: Tensor) -> None:
        """`tensor` lies in the host's memory, though it does not say so."""

    def shapes_only(self) -> AbstractContextManager[Any]:
        """What is made inside stands for no memory."""


_simulation: Scoped[Simulation | None] = Scoped("simulation", None)

simulation = _simulation.get
"""The simulation that runs in this thread, or None."""

simulate_with = _simulation.use
"""A context in which a simulation answers for the machine."""


def simulated_gpu() -> SimulatedGPU | None:
    """The GPU that this thread simulates, or None."""
    active = simulation()
    return None if active is None else active.gpu


def nothing(*args: object, **options: object) -> Any:
    """The result of an op that writes what it is given."""


def once_per_shape(
    key: Callable[..., Hashable], result: Callable[..., Any] = nothing
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare that an op works in many small parts, so a simulation runs it once for each key.

    `key` and `result` take the op's arguments. `key` must fix the memory that the op needs, and
    `result` makes the like of what the op returns.
    """

    def declare(op: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(op)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            active = simulation()
            if active is None:
                return op(*args, **kwargs)
            outcome: R = active.once(
                (op.__qualname__, key(*args, **kwargs)),
                lambda: op(*args, **kwargs),
                lambda: result(*args, **kwargs),
            )
            return outcome

        return call

    return declare


def equal_parts(parts: Iterable[T]) -> Iterable[T]:
    """The parts of an op that all take the same memory and leave none, but for a short last one.

    A simulation goes through a few of them.
    """
    active = simulation()
    return parts if active is None else active.some(list(parts))


def equal_parts_by(size: Callable[[T], Hashable], parts: Iterable[T]) -> Iterable[T]:
    """The parts of an op that leave no memory and take as much as others of their size.

    A simulation goes through a few of each size.
    """
    active = simulation()
    if active is None:
        return parts
    alike: dict[Hashable, list[T]] = {}
    for part in parts:
        alike.setdefault(size(part), []).append(part)
    return itertools.chain.from_iterable(map(active.some, alike.values()))


def stays_on_host(tensor: Tensor) -> None:
    """Say to a simulation that a tensor is read where it lies, in the host's memory."""
    active = simulation()
    if active is not None:
        active.stays_on_host(tensor)


def shapes_only() -> AbstractContextManager[Any]:
    """Tensors that are made inside on the meta device are not counted in a simulation either."""
    active = simulation()
    return nullcontext() if active is None else active.shapes_only()
