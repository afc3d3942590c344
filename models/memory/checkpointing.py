"""The joint between autograd and the hand-written blocks: one node of the graph per layer.

A layer's node keeps its input and what the checkpointing policy keeps (see `models.layers.block`);
everything else is recomputed when its backward pass is reached. Inputs and weights may be lent to
the host (`models.memory.offload`). Source of the idea: Chen et al. 2016 (arXiv 1604.06174); of
keeping attention's output: Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from models.layers.block import Batch, DecoderLayer
from models.layers.moe import MoESaved


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: DecoderLayer, batch: Batch, policy: str, *params: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        if batch.checkpoints is None:
            ctx.save_for_backward(x)
        else:
            batch.checkpoints.keep(layer.index, x)
        with _present(layer, batch, 1):
            y, ctx.saved = layer.forward(x, batch, policy)
        ctx.layer, ctx.batch, ctx.params = layer, batch, params
        if batch.routed is None or not isinstance(ctx.saved.mlp, MoESaved):
            return y
        batch.routed.append((ctx.saved.mlp.saved.counts, ctx.saved.mlp.saved.prob_sum))
        return y, ctx.saved.mlp.saved.prob_sum.clone()

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, d_prob_sum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if ctx.saved is None:
            raise RuntimeError("the activations of this graph are freed; run forward again")
        saved, ctx.saved = ctx.saved, None
        if isinstance(saved.mlp, MoESaved):
            saved.mlp.d_prob_sum = d_prob_sum
        layer, batch = ctx.layer, ctx.batch
        with _present(layer, batch, -1):
            if batch.checkpoints is None:
                (x,) = ctx.saved_tensors
            else:
                x = batch.checkpoints.fetch(layer.index)
            dx, grads = layer.backward(dy.contiguous(), x, batch, saved, ctx.needs_input_grad[0])
        return dx, None, None, None, *(grads.get(id(p)) for p in ctx.params)


def _present(layer: DecoderLayer, batch: Batch, ahead: int) -> AbstractContextManager[None]:
    """The layer's weights on the device, where they are offloaded to the host."""
    return nullcontext() if batch.weights is None else batch.weights.present(layer.index, ahead)


def run_layer(x: Tensor, layer: DecoderLayer, batch: Batch, policy: str) -> Tensor:
    """x (N, H) -> y (N, H) with gradients for x and the layer's trainable parameters.

    Where the batch asks for it, a mixture's counts and sum of probabilities are noted there, the
    latter with its gradient.
    """
    params = layer.trainable()
    if not torch.is_grad_enabled() or not (params or x.requires_grad):
        with _present(layer, batch, 1):
            y, saved = layer.forward(x, batch, "full")
        if batch.routed is not None and isinstance(saved.mlp, MoESaved):
            batch.routed.append((saved.mlp.saved.counts, saved.mlp.saved.prob_sum))
        return y
    out: Tensor | tuple[Tensor, Tensor] = _Layer.apply(x, layer, batch, policy, *params)
    if isinstance(out, Tensor):
        return out
    y, prob_sum = out
    assert batch.routed is not None
    batch.routed[-1] = (batch.routed[-1][0], prob_sum)
    return y
