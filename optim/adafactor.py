"""Adafactor: second moments as the product of a row and a column.

Maths (Shazeer & Stern 2018, arXiv 1804.04235, without momentum and with a given rate), in fp32,
with g the scaled gradient of a matrix and t the step from 1:

    b = 1 - t^-0.8        s = g^2 + 1e-30
    r = b r + (1 - b) mean over columns of s        c = b c + (1 - b) mean over rows of s
    u = g / sqrt(r c^T / mean(r))        u = u / max(1, rms(u) / 1)
    p = (1 - lr wd) p - lr u

A vector has a second moment of its own. Of more than two dimensions the last two count, as for
experts. It is transformers' Adafactor with scale_parameter and relative_step off, as its Trainer
has it. The state of a matrix is a row and a column: next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.per_parameter import PerParameter, add_update

_EPS, _DECAY_RATE, _CLIP = 1e-30, -0.8, 1.0


class Adafactor(PerParameter):
    """Adafactor with a learning rate of its user's and decoupled weight decay."""

    def __init__(self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Row and column of a matrix, the second moment of a vector."""
        shape = param.shape
        shapes = {"exp_avg_sq": shape}
        if param.ndim >= 2:
            shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        return {
            name: torch.zeros(part, dtype=torch.float32, device=param.device)
            for name, part in shapes.items()
        }

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        """One step of a parameter; the gradient's memory becomes the update's."""
        beta = 1.0 - step**_DECAY_RATE
        square = grad.square().add_(_EPS)
        if "exp_avg_sq" in state:
            scale = state["exp_avg_sq"].mul_(beta).add_(square, alpha=1.0 - beta).rsqrt()
            update = grad.mul_(scale)
        else:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.mul_(beta).add_(square.mean(dim=-1), alpha=1.0 - beta)
            column.mul_(beta).add_(square.mean(dim=-2), alpha=1.0 - beta)
            down = (row / row.mean(dim=-1, keepdim=True)).rsqrt_()
            update = grad.mul_(down.unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        del square
        size = torch.linalg.vector_norm(update) / update.numel() ** 0.5
        update.div_((size / _CLIP).clamp_(min=1.0))
        lr = float(group["lr"])
        add_update(param, update, 1.0 - lr * group["weight_decay"], -lr)
