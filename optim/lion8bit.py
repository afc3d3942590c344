"""Lion with its momentum in 8 bits.

Maths (Chen et al. 2023, arXiv 2302.06675), in fp32, with g the scaled gradient:

    p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g)        m = b2 m + (1 - b2) g

m is stored in blocks of 256 in the signed dynamic 8-bit map (`kernels.adamw8bit.dynamic_map`), a
parameter under `min_8bit_size` elements in fp32, as bitsandbytes does. The state takes one byte per
parameter, half of what 8-bit AdamW's takes. Every element moves by lr, so that Lion wants a third
to a tenth of AdamW's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kernels.adamw8bit import ROW, ZERO_CODE
from kernels.adamw8bit.dynamic_map import dequantize_blocks, quantize_blocks
from kernels.runtime.simulation import equal_parts
from optim.per_parameter import PerParameter

_ROWS = 4096
"""Rows of 256 elements that are worked on at once."""


class Lion8bit(PerParameter):
    """Lion with decoupled weight decay and block-wise 8-bit momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        self._min_8bit_size = min_8bit_size
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Codes and scales of rows of 256, or the momentum itself."""
        if param.numel() < group.get("min_8bit_size", self._min_8bit_size):
            return {"exp_avg": torch.zeros(param.shape, dtype=torch.float32, device=param.device)}
        rows = -(-param.numel() // ROW)
        return {
            "exp_avg": torch.full((rows, ROW), ZERO_CODE, dtype=torch.uint8, device=param.device),
            "exp_avg_absmax": torch.zeros(rows, dtype=torch.float32, device=param.device),
        }

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        """One step of a parameter, some rows at a time."""
        if "exp_avg_absmax" not in state:
            _lion(param, grad, state["exp_avg"], group)
            return
        flat, flat_grad = param.view(-1), grad.reshape(-1)
        codes, absmax = state["exp_avg"], state["exp_avg_absmax"]
        for first in equal_parts(range(0, codes.shape[0], _ROWS)):
            rows = slice(first, min(first + _ROWS, codes.shape[0]))
            part = slice(rows.start * ROW, min(rows.stop * ROW, flat.numel()))
            momentum = dequantize_blocks(codes[rows], absmax[rows], signed=True)
            used = momentum.view(-1)[: part.stop - part.start]
            _lion(flat[part], flat_grad[part], used, group)
            new, largest = quantize_blocks(momentum, signed=True, rounding="nearest")
            # A negative momentum never becomes 0, as in bitsandbytes' CUDA kernel.
            new.sub_(((new == ZERO_CODE) & (momentum < 0)).to(torch.uint8))
            codes[rows], absmax[rows] = new, largest


def _lion(param: Tensor, grad: Tensor, momentum: Tensor, group: Mapping[str, Any]) -> None:
    """The maths of the module's docstring, in place."""
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    direction = torch.sign(momentum * beta1 + grad * (1.0 - beta1))
    wide = param.to(torch.float32) * (1.0 - lr * group["weight_decay"])
    param.copy_(wide.sub_(direction, alpha=lr))
    momentum.mul_(beta2).add_(grad, alpha=1.0 - beta2)
