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

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.dropout import Seed
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.linear.adapters import AdapterSaved, Gradients
from kernels.linear.columns import Columns, blocks_of, copied, input_columns
from kernels.linear.decode import Decoded, decode
from kernels.linear.lora import project
from kernels.linear.lora_backward import input_gradient, parameter_gradients, project_backward
from kernels.linear.projection import Projection

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
    """gate and up (N, I) of a forward pass, in the matrices they were made in.

    Backward overwrites them. What adapters left (the second values of `project`) is recomputed when
    None: `adapter_input` of gate and up, `down_input` of down.
    `strength` (N, 1) scales h.
    """

    outputs: tuple[Columns, ...]
    adapter_input: AdapterSaved | None = None
    down_input: AdapterSaved | None = None
    strength: Tensor | None = None

    def gate_up(self) -> tuple[Tensor, Tensor]:
        """gate and up (N, I), views."""
        gate, up = (part for columns in self.outputs for part in columns.parts)
        return gate, up


def mlp_inner(
    x: Tensor | Columns,
    mlp: SwiGLUMLP,
    decoded: DecodedMLP = NOT_DECODED,
    strength: Tensor | None = None,
) -> MLPActivations:
    """gate and up (N, I) of x (N, H)."""
    outputs: list[Columns] = []
    saved = None
    for group in mlp.products():
        ys, saved = project(x, group, mlp.seeds[0], decoded[0])
        outputs.append(ys)
    if mlp.one_weight_at_a_time:
        saved = None
    return MLPActivations(tuple(outputs), saved, strength=strength)


def mlp_activated(inner: MLPActivations, mlp: SwiGLUMLP) -> Tensor | Columns:
    """h (N, I), which down reads, with spare columns where its adapter joins the product."""
    gate, up = inner.gate_up()
    own = input_columns(gate, (mlp.down,))
    h = swiglu_forward(gate, up, out=None if own is None else own.matrix)
    if inner.strength is not None:
        h.mul_(inner.strength.to(h.dtype))
    return h if own is None else own


def mlp_forward(
    x: Tensor | Columns, mlp: SwiGLUMLP, strength: Tensor | None = None
) -> tuple[Tensor, MLPActivations]:
    """y (N, H) for x (N, H), and what `mlp_backward` reads."""
    return mlp_output(mlp_inner(x, mlp, strength=strength), mlp)


def mlp_output(inner: MLPActivations, mlp: SwiGLUMLP) -> tuple[Tensor, MLPActivations]:
    """The second half of `mlp_forward`, which does not read x."""
    h = mlp_activated(inner, mlp)
    ys, low = project(h, (mlp.down,), mlp.seeds[1], slot=mlp.down_slot, spare=False)
    return ys.matrix, replace(inner, down_input=low)


def mlp_backward(
    dy: Tensor | Columns,
    x: Tensor | Columns,
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
    d_strength = mlp_down_backward(dy, mlp, inner, grads, decoded[1])
    dx = mlp_gate_up_backward(x, mlp, inner, grads, decoded[0], need_dx=need_dx)
    return dx, d_strength


def mlp_gate_up_backward(
    x: Tensor | Columns,
    mlp: SwiGLUMLP,
    inner: MLPActivations,
    grads: Gradients,
    decoded: Decoded | None = None,
    *,
    need_dx: bool = True,
) -> Tensor | None:
    """The second half of `mlp_backward`: dx (N, H), or None without `need_dx`."""
    dx: Tensor | None = None
    for group, d_outputs in zip(mlp.products(), inner.outputs, strict=True):
        addend = project_backward(
            d_outputs,
            x,
            group,
            grads,
            seed=mlp.seeds[0],
            saved=inner.adapter_input,
            decoded=decoded,
            need_dx=need_dx,
        )
        dx = addend if dx is None or addend is None else dx.add_(addend)
    return dx


def mlp_down_backward(
    dy: Tensor | Columns,
    mlp: SwiGLUMLP,
    inner: MLPActivations,
    grads: Gradients,
    decoded: Decoded | None,
) -> Tensor | None:
    """The first half of `mlp_backward`, which does not read x; returns d_strength (N, 1).

    Gradients of gate and up are left in their memory, those of down's parameters in `grads`.
    h is not computed by itself: the gradients of gate and up leave it in the memory of dh, and only
    then those of down's parameters, which read it, are computed.
    """
    down, seed, strength = (mlp.down,), mlp.seeds[1], inner.strength
    gate, up = inner.gate_up()
    dys = blocks_of(dy)
    decoded = decoded or decode(down, dys[0].dtype, mlp.down_slot)
    if strength is not None:
        h = swiglu_forward(gate, up)
        scaled, low = h * strength.to(h.dtype), inner.down_input
        dh = project_backward(dys, scaled, down, grads, seed=seed, saved=low, decoded=decoded)
        assert dh is not None
        d_strength = (dh.to(strength.dtype) * h).sum(1, keepdim=True)
        swiglu_backward_(dh.mul_(strength.to(dh.dtype)), gate, up)
        return d_strength
    dh, outputs = input_gradient(dys, down, seed=seed, saved=inner.down_input, decoded=decoded)
    assert dh is not None
    swiglu_backward_(dh, gate, up, keep_h=True)
    parameter_gradients(outputs, dh, down, grads, seed=seed)
    return None


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: SwiGLUMLP, *params: Tensor) -> Tensor:
        y, inner = mlp_forward(x, mlp)
        first, second = inner.adapter_input, inner.down_input
        assert first is not None and second is not None
        ctx.save_for_backward(x, *inner.gate_up(), first.low, second.low)
        ctx.mlp, ctx.params, ctx.scales = mlp, params, (first.scales, second.scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, first, second = ctx.saved_tensors
        mlp: SwiGLUMLP = ctx.mlp
        grads: Gradients = {}
        # Saved tensors must survive a backward pass that is asked for again: work on a copy, in
        # the layout with spare columns for P (see `kernels.linear.lora`).
        outputs = (copied((gate, up), (mlp.gate, mlp.up)),)
        saved = (AdapterSaved(first, ctx.scales[0]), AdapterSaved(second, ctx.scales[1]))
        inner = MLPActivations(outputs, *saved)
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
