"""A CUDA GPU's way through the kernels for a simulated step, taken on tensors without memory.

Meta tensors say that they lie on `GPU`, Triton kernels are not launched, what asks the machine for
a GPU is answered, and what is offloaded to the host's memory is counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

import kernels.adamw8bit.launch
import kernels.attention.choice
import kernels.linear.int8
import kernels.loss.linear_cross_entropy
import kernels.nf4.tiles
import kernels.runtime.host_memory
from engine.memory.simulate.meter import META, DryMeter
from engine.memory.simulate.shortcuts import users
from kernels.linear.int8 import Int8Weight
from kernels.runtime.triton_support import HAS_TRITON, _AbsentKernel
from optim import StepInBackward

GPU = torch.device("cuda", 127)
"""The device that meta tensors claim. No machine has it, so nothing cached for it is ever used."""

_ATTENTION = ("flash", "documents")
_DEVICE, _IS_CUDA, _IS_CPU = torch.Tensor.device, torch.Tensor.is_cuda, torch.Tensor.is_cpu


def _no_launch(kernel: Any, grid: Any) -> Callable[..., None]:
    return lambda *args, **options: None


class OnGPU(TorchFunctionMode):
    """Meta tensors say that they lie on `GPU`, and what is to lie there becomes a meta tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **options)
        asked = getattr(func, "__self__", None)
        if asked is _DEVICE or asked is _IS_CUDA:
            if args[0].is_meta:
                return GPU if asked is _DEVICE else True
            return func(*args)
        if options.get("device") == GPU:
            options["device"] = META
        if any(isinstance(x, torch.device) for x in args):
            args = tuple(META if isinstance(x, torch.device) and x == GPU else x for x in args)
        return func(*args, **options)


def also_backward(mode: TorchFunctionMode) -> list[tuple[Any, str, Any]]:
    """autograd calls what runs in backward without the mode; this enters it again."""

    def in_mode(owner: Any, name: str) -> tuple[Any, str, Any]:
        called = getattr(owner, name)

        def call_in_mode(*args: Any) -> Any:
            with mode:
                return called(*args)

        return owner, name, call_in_mode

    return [
        in_mode(torch.autograd.function.BackwardCFunction, "apply"),
        in_mode(StepInBackward, "_arrive"),
    ]


class OnHost(TorchFunctionMode):
    """Meta tensors say that they lie in the CPU's memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__self__", None) is _IS_CPU and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _rows(table: Tensor, index: Tensor, device: torch.device) -> Tensor:
    return torch.empty((index.numel(), table.shape[1]), dtype=table.dtype, device="meta")


def host_ways() -> list[tuple[Any, str, Any]]:
    """Replacements for a CPU, whose memory is the host's: what is put there is a meta tensor."""

    def copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device="meta")

    changes = (
        (kernels.runtime.host_memory.host_copy, copy),
        (kernels.runtime.host_memory.gather_rows, _rows),
    )
    return [(module, name, dry) for function, dry in changes for module, name in users(function)]


def _lending_ways(meter: DryMeter) -> list[tuple[Any, str, Any]]:
    """Replacements of what moves tensors between a GPU and the host, whose memory is apart."""

    def kept_aside(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with _disable_current_modes():
            copy = torch.empty(x.shape, dtype=dtype or x.dtype, device="meta")
        meter.put_aside(copy)
        return copy

    def room_aside(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return kept_aside(x, dtype)

    def quantize_rows(weight: Tensor, device: torch.device | None = None) -> Int8Weight:
        if device is not None:  # the matrix lies in a mapped file and goes over in parts
            meter.ignore([weight])
        return quantize(weight, device)

    quantize = kernels.linear.int8.quantize_int8
    return [
        (module, name, dry)
        for function, dry in (
            (quantize, quantize_rows),
            (kernels.runtime.host_memory.host_copy, kept_aside),
            (kernels.runtime.host_memory.host_room, room_aside),
            (kernels.runtime.host_memory.copy_stream, lambda device: None),
            (kernels.runtime.host_memory.gather_rows, _rows),
        )
        for module, name in users(function)
    ]


def gpu_ways(meter: DryMeter) -> list[tuple[Any, str, Any]]:
    """Replacements of what asks the machine for a GPU."""
    if HAS_TRITON:
        from triton.runtime.jit import KernelInterface as Kernel
    else:
        Kernel = _AbsentKernel

    def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    return [
        *((module, name, upload) for module, name in users(kernels.adamw8bit.launch.upload)),
        (torch.cuda, "current_device", lambda: GPU.index),
        (kernels.loss.linear_cross_entropy, "_multiplies_into_fp32", lambda device, dtype: True),
        (kernels.attention.choice, "_works", lambda backend, kind: backend.name in _ATTENTION),
        (kernels.nf4.tiles, "_device_numbers", lambda device: (80, 108)),
        (Kernel, "__getitem__", _no_launch),
        *_lending_ways(meter),
    ]
