"""The SwiGLU feed-forward network, with its backward pass.

    g = gate(x),  u = up(x),  h = silu(g) * u,  y = down(c * h)

c (N, 1) is a strength per token, 1 but for the shared expert of a mixture. With a = down^T dy:

    dc = a . h,   dh = c a,   (dg, du) as in `kernels.elementwise.swiglu`,
    dx = gate^T dg + up^T du

x, y (N, H), g, u, h (N, I), all of one dtype; c fp32 or wider. The products, with biases, adapters,
dropout and quantised weights, are those of `kernels.linear.lora`. Source: Shazeer 2020 (arXiv
2002.05202).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.dropout import Seed
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.linear.lora import Gradients, project, project_backward
from kernels.linear.projection import Decoded, Projection, decode, output_columns

Seeds = tuple[Seed | None, Seed | None]
"""Seeds of the dropout before gate and up, and of that before down; None means no dropout."""

DecodedMLP = tuple[Decoded | None, Decoded | None]
"""Gate and up, and down, as dense weights; None where a product decodes its own."""

NOT_DECODED: DecodedMLP = (None, None)


@dataclass(frozen=True)
class SwiGLUMLP:
    """The operands of one feed-forward network.

    `down_slot` is the scratch that down is decoded into: with a slot of its own, gate and up stay
    decoded meanwhile. With `one_weight_at_a_time` no two decoded weights exist together: gate and
    up become two products, and every product decodes its weight again.
    """

    gate: Projection
    up: Projection
    down: Projection
    seeds: Seeds = (None, None)
    down_slot: str = "wide"
    one_weight_at_a_time: bool = False

    def projections(self) -> tuple[Projection, Projection, Projection]:
        return self.gate, self.up, self.down

    def products(self) -> tuple[tuple[Projection, ...], ...]:
        """Gate and up as the groups of projections that one product computes."""
        if self.one_weight_at_a_time:
            return (self.gate,), (self.up,)
        return ((self.gate, self.up),)

    def decode(self, dtype: torch.dtype) -> DecodedMLP:
        """All weights for several uses, where they may exist together."""
        if self.one_weight_at_a_time:
            return NOT_DECODED
        gate_up = decode((self.gate, self.up), dtype)
        return gate_up, decode((self.down,), dtype, self.down_slot)


@dataclass(frozen=True)
class MLPActivations:
    """gate and up (N, I) of a forward pass; backward overwrites them.

    `adapter_input` is the second value of `project` for gate and up, recomputed when None;
    `strength` (N, 1) scales h.
    """

    gate: Tensor
    up: Tensor
    adapter_input: Tensor | None = None
    strength: Tensor | None = None


def mlp_inner(
    x: Tensor,
    mlp: SwiGLUMLP,
    decoded: DecodedMLP = NOT_DECODED,
    strength: Tensor | None = None,
) -> MLPActivations:
    """gate and up (N, I) of x (N, H)."""
    outputs: list[Tensor] = []
    xa = None
    for group in mlp.products():
        ys, xa = project(x, group, mlp.seeds[0], decoded[0])
        outputs += ys
    gate, up = outputs
    return MLPActivations(gate, up, None if mlp.one_weight_at_a_time else xa, strength)


def mlp_forward(
    x: Tensor, mlp: SwiGLUMLP, strength: Tensor | None = None
) -> tuple[Tensor, MLPActivations]:
    """y (N, H) for x (N, H), and what `mlp_backward` reads."""
    inner = mlp_inner(x, mlp, strength=strength)
    h = swiglu_forward(inner.gate, inner.up)
    if strength is not None:
        h.mul_(strength.to(h.dtype))
    (y,), _ = project(h, (mlp.down,), mlp.seeds[1], slot=mlp.down_slot)
    return y, inner


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    mlp: SwiGLUMLP,
    inner: MLPActivations,
    grads: Gradients,
    *,
    decoded: DecodedMLP = NOT_DECODED,
    need_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds every wanted parameter gradient to `grads`; returns dx (N, H) and d_strength (N, 1).

    dx is None without `need_dx`, d_strength without a strength. `inner` is overwritten.
    """
    d_inner, d_strength = _down_backward(dy, mlp, inner, grads, decoded[1])
    d_outputs = iter(swiglu_backward_(d_inner, inner.gate, inner.up))
    del d_inner
    dx: Tensor | None = None
    for group in mlp.products():
        addend = project_backward(
            [next(d_outputs) for _ in group],
            x,
            group,
            grads,
            seed=mlp.seeds[0],
            xa=inner.adapter_input,
            decoded=decoded[0],
            need_dx=need_dx,
        )
        dx = addend if dx is None or addend is None else dx.add_(addend)
    return dx, d_strength


def _down_backward(
    dy: Tensor,
    mlp: SwiGLUMLP,
    inner: MLPActivations,
    grads: Gradients,
    decoded: Decoded | None,
) -> tuple[Tensor, Tensor | None]:
    """dh (N, I) of dy (N, H), and the gradient of the strength; h is recomputed."""
    h, strength = swiglu_forward(inner.gate, inner.up), inner.strength
    scaled = h if strength is None else h * strength.to(h.dtype)
    decoded = decoded or decode((mlp.down,), h.dtype, mlp.down_slot)
    dh = project_backward((dy,), scaled, (mlp.down,), grads, seed=mlp.seeds[1], decoded=decoded)
    assert dh is not None
    if strength is None:
        return dh, None
    d_strength = (dh.to(strength.dtype) * h).sum(1, keepdim=True)
    return dh.mul_(strength.to(dh.dtype)), d_strength


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: SwiGLUMLP, *params: Tensor) -> Tensor:
        y, inner = mlp_forward(x, mlp)
        ctx.save_for_backward(x, inner.gate, inner.up, inner.adapter_input)
        ctx.mlp, ctx.params = mlp, params
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, xa = ctx.saved_tensors
        mlp: SwiGLUMLP = ctx.mlp
        grads: Gradients = {}
        # Saved tensors must survive a backward pass that is asked for again: work on a copy, in
        # the layout with spare columns for P (see `kernels.linear.lora`).
        fresh = output_columns(x.shape[0], (mlp.gate, mlp.up), x)
        inner = MLPActivations(fresh[0].copy_(gate), fresh[1].copy_(up), xa)
        dx, _ = mlp_backward(dy, x, mlp, inner, grads, need_dx=ctx.needs_input_grad[0])
        return dx, None, *(grads.get(id(p)) for p in ctx.params)


def lora_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, seed: Seed | None = None
) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x (N, in), saving x and the two inner activations only."""
    mlp = SwiGLUMLP(gate, up, down, (seed, None if seed is None else seed.at(1)))
    params = [t for projection in mlp.projections() for t in projection.trainable()]
    y: Tensor = _LoraMLP.apply(x, mlp, *params)
    return y
