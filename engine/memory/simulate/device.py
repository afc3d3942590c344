"""Simulate a device: tensors without memory claim to lie on it.

Both modes are torch's own extension points: they are entered for a block, in one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from engine.memory.simulate.simulated_meter import META
from kernels.runtime.simulation import SimulatedGPU

GPU = torch.device("cuda", 127)
"""The device that meta tensors claim. No machine has it, so nothing cached for it is ever used."""

ASSUMED_GPU = SimulatedGPU(GPU)

_DEVICE, _IS_CUDA, _IS_CPU = torch.Tensor.device, torch.Tensor.is_cuda, torch.Tensor.is_cpu


class _OnDevice(TorchFunctionMode, ABC):
    """A mode that holds in backward too.

    While torch calls a mode's handler the mode is off, so `Tensor.backward` would run without it.
    Meta tensors' backward runs in the calling thread, where the mode is entered again; autograd's
    engine is called directly, for every public function leads back to this handler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward:
            with self:
                return _engine_run_backward(
                    args, (torch.ones_like(args[0]),), False, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        return self.answer(func, args, dict(kwargs or {}))

    @abstractmethod
    def answer(self, func: Any, args: Any, options: dict[str, Any]) -> Any:
        """The result of one of torch's functions."""


class OnGPU(_OnDevice):
    """Meta tensors say that they lie on `GPU`, and what is to lie there becomes a meta tensor."""

    def answer(self, func: Any, args: Any, options: dict[str, Any]) -> Any:
        """The result, with `GPU` instead of the meta device."""
        if func is torch.device:
            return func(*args, **options)
        asked = getattr(func, "__self__", None)
        if asked is _DEVICE or asked is _IS_CUDA:
            if args[0].is_meta:
                return GPU if asked is _DEVICE else True
            return func(*args)
        if options and options.get("device") == GPU:
            options["device"] = META
        for x in args:
            if type(x) is torch.device and x == GPU:
                args = tuple(META if isinstance(y, torch.device) and y == GPU else y for y in args)
                break
        return func(*args, **options)


class OnHost(_OnDevice):
    """Meta tensors say that they lie in the CPU's memory."""

    def answer(self, func: Any, args: Any, options: dict[str, Any]) -> Any:
        """The result, in which a meta tensor is a CPU's."""
        if getattr(func, "__self__", None) is _IS_CPU and args[0].is_meta:
            return True
        return func(*args, **options)
