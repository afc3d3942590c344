"""Gradients at fixed addresses, for recorded backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.linear.adapters import Gradients

_ALIGNED = 64
"""Elements: every gradient starts where wide loads may."""


class GradientBuffer:
    """The gradients of some parameters, at fixed addresses.

    `attach` makes each of them the parameter's `grad`, with what was accumulated before.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.views: dict[int, Tensor] = {}
        self._flat = []
        for dtype in {p.dtype for p in parameters}:
            kind = [p for p in parameters if p.dtype == dtype]
            sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in kind]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=kind[0].device)
            for p, part in zip(kind, flat.split(sizes), strict=True):
                self.views[id(p)] = part[: p.numel()].view_as(p)
            self._flat.append(flat)

    def attach(self) -> None:
        """Gradients that were cleared start from zero; those of other memory are copied in."""
        if all(p.grad is None for p in self.parameters):
            for flat in self._flat:
                flat.zero_()
        for p in self.parameters:
            view = self.views[id(p)]
            if p.grad is view:
                continue
            if p.grad is not None:
                view.copy_(p.grad)
            p.grad = view

    def add(self, gradients: Gradients) -> None:
        """Accumulate one pass's gradients, after the parameters' own hooks."""
        for p in self.parameters:
            gradient = gradients.get(id(p))
            if gradient is None:
                continue
            for hook in (p._backward_hooks or {}).values():
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
            self.views[id(p)].add_(gradient)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo at the end what is added inside."""
        before = [flat.clone() for flat in self._flat]
        yield
        for flat, old in zip(self._flat, before, strict=True):
            flat.copy_(old)
