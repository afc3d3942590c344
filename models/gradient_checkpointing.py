"""The joint between autograd and the hand-written blocks: one node of the graph per layer.

A layer's node keeps its input and what the recompute level keeps (see `models.block`); everything
else is recomputed when its backward pass is reached. Source of the idea: Chen et al. 2016
(arXiv 1604.06174); of keeping attention's output: Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.block import Batch, DecoderLayer


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: DecoderLayer, batch: Batch, level: str, *params: Tensor
    ) -> Tensor:
        y, kept = layer.run(x, batch)
        ctx.save_for_backward(x)
        ctx.layer, ctx.batch, ctx.params = layer, batch, params
        ctx.kept = kept.trim(level)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("the activations of this graph are freed; run forward again")
        kept, ctx.kept = ctx.kept, None
        (x,) = ctx.saved_tensors
        dx, grads = ctx.layer.differentiate(
            dy.contiguous(), x, ctx.batch, kept, ctx.needs_input_grad[0]
        )
        return dx, None, None, None, *(grads.get(id(p)) for p in ctx.params)


def run_layer(x: Tensor, layer: DecoderLayer, batch: Batch, level: str) -> Tensor:
    """x (N, H) -> y (N, H) with gradients for x and the layer's trainable parameters."""
    params = layer.trainable()
    if not torch.is_grad_enabled() or not (params or x.requires_grad):
        return layer.run(x, batch)[0]
    y: Tensor = _Layer.apply(x, layer, batch, level, *params)
    return y
