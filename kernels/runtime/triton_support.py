"""Triton, stand-ins where it is not installed, and how kernels are launched.

Kernel files import `jit`, `tl` and `triton` from here, so that each of them can be imported on a
machine without Triton (macOS, Windows, a bare CPU): there `jit` makes of a function an object that
raises `RuntimeError` when it is launched. For the type checker `jit` is `typing.no_type_check`: a
Triton function is a program in another language that shares Python's syntax.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.runtime.device import current_index
from kernels.runtime.simulation import simulation

__all__ = ["HAS_TRITON", "cdiv", "jit", "launch", "next_power_of_2", "on_device", "tl", "triton"]


class _AbsentKernel:
    """What `jit` makes of a function where Triton is not installed."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = fn.__name__

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(
            f"the kernel {self.__name__} needs Triton, which is not installed: pip install triton, "
            "or set ENGINE_REFERENCE=1 to run the plain torch reference"
        )


class _Absent:
    """Stands for the modules `triton` and `triton.language`: any name is there, none works."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    def jit(self, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Decorator with and without options, as `triton.jit` is."""
        return _AbsentKernel if fn is None else _AbsentKernel(fn)


if TYPE_CHECKING:
    from typing import no_type_check as jit

    triton: Any
    tl: Any
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = _Absent()
    jit = triton.jit

HAS_TRITON = not isinstance(triton, _Absent)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


_AS_IT_IS = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `tensor` the current one: Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != current_index():
        return torch.cuda.device(tensor.device)
    return _AS_IT_IS


def launch(kernel: Any, grid: tuple[int, ...], operations: float = 0.0) -> Callable[..., Any]:
    """What launches a Triton kernel on `grid`: every launch goes through here.

    A simulated step launches nothing; it is told of the kernel and its floating-point `operations`.
    """
    active = simulation()
    run: Callable[..., Any] = kernel[grid] if active is None else active.launch(kernel, operations)
    return run
