"""Activation checkpointing: one autograd node per layer.

A layer's node saves its input and what the checkpointing policy saves (see `models.layers.block`);
everything else is recomputed when its backward pass is reached. Inputs and weights may be offloaded
to the host (`models.memory.offload`). Source of the idea: Chen et al. 2016 (arXiv 1604.06174); of
saving attention's output: Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.adapters import Gradients
from kernels.linear.columns import Columns
from models.layers.block import BlockSaved, DecoderLayer
from models.layers.context import LayerContext
from models.layers.moe import MoESaved, Routed
from models.memory.offload import LayerWeights, OffloadedInputs
from models.memory.sharded_parameters import ShardedParameters


class LayerGradient:
    """The gradient that one layer's backward pass returns to autograd, for the layer below.

    autograd hands the matrix on, but not whose memory it lies in. If it arrives as it left, the
    layer below may use the spare columns beside it.
    """

    def __init__(self) -> None:
        self._left: Columns | None = None

    def leave(self, dx: Tensor | Columns | None) -> Tensor | None:
        """dx as autograd takes it."""
        self._left = dx if isinstance(dx, Columns) else None
        return dx.matrix if isinstance(dx, Columns) else dx

    def arrive(self, dy: Tensor) -> Tensor | Columns:
        """dy as a layer takes it: with its spare columns if it is what the layer above left."""
        left, self._left = self._left, None
        return left if left is not None and left.is_matrix(dy) else dy.contiguous()


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass over the layers, and what its backward pass needs.

    `policies` are the layers' checkpointing policies. Where there are `inputs`, the layers' inputs
    wait there for backward; where there are `weights`, they come from there. Each mixture adds to
    the list `routed`, if there is one.
    """

    context: LayerContext
    policies: tuple[str, ...]
    inputs: OffloadedInputs | None = None
    weights: LayerWeights | None = None
    routed: Routed | None = None
    gradient: LayerGradient = field(default_factory=LayerGradient)

    def with_weights(self, layer: DecoderLayer, ahead: int) -> AbstractContextManager[None]:
        """Inside the block, a layer whose weights are elsewhere has them on the device."""
        if self.weights is None:
            return nullcontext()
        return self.weights.weights_of(layer.index, ahead)

    def leaves(self, layer: DecoderLayer) -> list[Tensor]:
        """What of a layer autograd sees as trained."""
        if isinstance(self.weights, ShardedParameters):
            return self.weights.leaves_of(layer.index)
        return layer.trainable()

    def returned(
        self, layer: DecoderLayer, gradients: Gradients, leaves: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients that autograd gets for `leaves`; none where ranks add them up."""
        if isinstance(self.weights, ShardedParameters):
            self.weights.reduce(layer.index, gradients)
            return (None,) * len(leaves)
        return tuple(gradients.get(id(leaf)) for leaf in leaves)

    def note_routing(self, saved: BlockSaved) -> Tensor | None:
        """Add a mixture's counts and sums to `routed`; returns the sums if they were added."""
        if self.routed is None or not isinstance(saved.mlp, MoESaved):
            return None
        experts = saved.mlp.experts
        self.routed.append((experts.counts, experts.prob_sum))
        return experts.prob_sum


class _CheckpointedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: DecoderLayer, run: ForwardPass, *params: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        if run.inputs is None:
            ctx.save_for_backward(x)
        else:
            run.inputs.save(layer.index, x)
        with run.with_weights(layer, 1):
            y, ctx.saved = layer.forward(x, run.context, run.policies[layer.index])
        ctx.layer, ctx.run, ctx.params = layer, run, params
        prob_sum = run.note_routing(ctx.saved)
        return y if prob_sum is None else (y, prob_sum.clone())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor, d_prob_sum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if ctx.saved is None:
            raise RuntimeError("the activations of this graph are freed; run forward again")
        saved, ctx.saved = ctx.saved, None
        if isinstance(saved.mlp, MoESaved):
            saved.mlp.d_prob_sum = d_prob_sum
        layer, run = ctx.layer, ctx.run
        with run.with_weights(layer, -1):
            if run.inputs is None:
                (x,) = ctx.saved_tensors
            else:
                x = run.inputs.fetch(layer.index)
            dx, grads = layer.backward(
                run.gradient.arrive(dy), x, run.context, saved, ctx.needs_input_grad[0]
            )
            returned = run.returned(layer, grads, ctx.params)
        given = run.gradient.leave(dx)
        return given, None, None, *returned


def run_layer(x: Tensor, layer: DecoderLayer, run: ForwardPass) -> Tensor:
    """x (N, H) -> y (N, H) with gradients for x and the layer's trainable parameters.

    Where the pass asks for it, a mixture's counts and sums of probabilities are noted there, the
    latter with their gradient.
    """
    params = run.leaves(layer) if torch.is_grad_enabled() else []
    if not params and not (torch.is_grad_enabled() and x.requires_grad):
        with run.with_weights(layer, 1):
            y, saved = layer.forward(x, run.context, "full")
        run.note_routing(saved)
        return y
    out: Tensor | tuple[Tensor, Tensor] = _CheckpointedLayer.apply(x, layer, run, *params)
    if isinstance(out, Tensor):
        return out
    y, prob_sum = out
    assert run.routed is not None
    run.routed[-1] = (run.routed[-1][0], prob_sum)
    return y
