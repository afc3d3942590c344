"""Linear projections that share an input: plain, LoRA and QLoRA through one path.

For projections i with weight W_i (out_i, in), bias b_i and adapter A_i (r, in), B_i (out_i, r):

    y_i = x W_i^T + b_i + s_i (x~ A_i^T) B_i^T,     x~ = dropout(x)

    P_i = s_i dy_i B_i
    dx  = sum_i dy_i W_i + dropout(sum_i P_i A_i)
    dA_i = P_i^T x~,   dB_i = s_i dy_i^T (x~ A_i^T),   dW_i = dy_i^T x,   db_i = sum dy_i

W_i may be NF4 or 8-bit rows: it is dequantised into reused scratch and never saved. All A_i that
read the same x form one skinny product; where all W_i are quantised they are dequantised one below
the other, so that q, k, v (and gate, up) are one product in either direction. Source: Hu et al.
2021 (LoRA, arXiv 2106.09685); Dettmers et al. 2023 (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dropout import dropout
from kernels.int8 import Int8Weight, dequantize_int8
from kernels.nf4 import NF4Weight, dequantize
from kernels.scratch import scratch
from kernels.swiglu import swiglu_backward_, swiglu_forward

QuantizedWeight = NF4Weight | Int8Weight
Weight = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Projection:
    """One linear map: `weight` (out, in) dense or quantised, optional bias (out,) and LoRA pair."""

    weight: Weight
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def trainable(self) -> list[Tensor]:
        """The tensors of this projection that want a gradient, in a fixed order."""
        found = (self.weight, self.bias, self.lora_a, self.lora_b)
        return [t for t in found if isinstance(t, Tensor) and t.requires_grad]


Gradients = dict[int, Tensor]
"""id of a trainable tensor -> its gradient."""


def dense_weights(
    projections: Sequence[Projection], dtype: torch.dtype, slot: str = "wide"
) -> list[Tensor]:
    """The weights as dense matrices of `dtype`; quantised ones lie one below the other in scratch.

    Valid until the next call for the same `slot`. A decoder block uses two slots, "wide" for the
    projections that read the block's input and "narrow" for the one that writes its output, so
    that a backward pass decodes each weight once for recompute and gradient together.
    """
    quantized = [p.weight for p in projections if not isinstance(p.weight, Tensor)]
    if not quantized:
        return [p.weight.to(dtype) for p in projections if isinstance(p.weight, Tensor)]
    rows = sum(w.shape[0] for w in quantized)
    joined = scratch(
        f"dequantized.{slot}", (rows, quantized[0].shape[1]), dtype, quantized[0].device
    )
    weights, row = [], 0
    for projection in projections:
        weight = projection.weight
        if isinstance(weight, Tensor):
            weights.append(weight.to(dtype))
            continue
        part = joined[row : row + weight.shape[0]]
        decode_weight(weight, dtype, out=part)
        weights.append(part)
        row += weight.shape[0]
    return weights


def decode_weight(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A quantised weight as a dense matrix (out, in) of `dtype`."""
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, dtype, out=out)
    if dtype == torch.float64:  # NF4 values are fp32 by definition; fp64 is for gradient checks
        wide = dequantize(weight, torch.float32).double()
        return wide if out is None else out.copy_(wide)
    return dequantize(weight, dtype, out=out)


def _stacked(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The one matrix of which `parts` are consecutive rows (dim 0) or columns (dim 1), if any."""
    first = parts[0]
    step = first.stride(dim)
    offset = first.storage_offset()
    for part in parts:
        same = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.stride() == first.stride()
            and part.shape[1 - dim] == first.shape[1 - dim]
            and part.storage_offset() == offset
        )
        if not same:
            return None
        offset += part.shape[dim] * step
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def project(
    x: Tensor,
    projections: Sequence[Projection],
    seed: int | None = None,
    weights: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """y_i (N, out_i) for x (N, in), as column blocks of one matrix, and x~ A^T (N, sum r).

    `seed` None means no dropout (evaluation). `weights` are `dense_weights` already at hand.
    """
    weights = weights or dense_weights(projections, x.dtype)
    widths = [p.out_features for p in projections]
    joined = _stacked(weights, 0)
    if joined is not None:
        out = x @ joined.T
    else:
        out = x.new_empty(x.shape[0], sum(widths))
        for part, weight in zip(out.split(widths, 1), weights, strict=True):
            part.copy_(x @ weight.T)
    ys = list(out.split(widths, 1))
    xa = adapter_input(x, projections, seed)
    for y, projection, low in zip(ys, projections, _split_ranks(xa, projections), strict=True):
        if projection.bias is not None:
            y += projection.bias.to(y.dtype)
        if projection.lora_b is not None and low is not None:
            y.addmm_(low, projection.lora_b.to(y.dtype).T, alpha=projection.scale)
    return ys, xa


def adapter_input(x: Tensor, projections: Sequence[Projection], seed: int | None) -> Tensor | None:
    """x~ A^T (N, sum of ranks) for all adapters on x, or None without adapters."""
    stacked = _stacked_a(projections, x.dtype)
    if stacked is None:
        return None
    return _dropped(x, projections, seed) @ stacked.T


def _stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    parts = [p.lora_a.to(dtype) for p in projections if p.lora_a is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dropped(x: Tensor, projections: Sequence[Projection], seed: int | None) -> Tensor:
    p = max(projection.dropout for projection in projections)
    return x if seed is None else dropout(x, p, seed)


def _split_ranks(joined: Tensor | None, projections: Sequence[Projection]) -> list[Tensor | None]:
    """Column blocks of (N, sum of ranks), one per projection, None where it has no adapter."""
    if joined is None:
        return [None] * len(projections)
    ranks = [0 if p.lora_a is None else int(p.lora_a.shape[0]) for p in projections]
    parts = joined.split(ranks, 1)
    return [part if rank else None for part, rank in zip(parts, ranks, strict=True)]


def project_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    *,
    seed: int | None = None,
    xa: Tensor | None = None,
    weights: list[Tensor] | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """Adds every wanted parameter gradient to `grads` and returns dx (N, in).

    `xa` is the second value of `project`, recomputed when None. With `need_dx=False` the products
    with W are skipped: nothing below needs a gradient.
    """
    if xa is None:
        xa = adapter_input(x, projections, seed)
    products = []
    for dy, projection, low in zip(dys, projections, _split_ranks(xa, projections), strict=True):
        _dense_gradients(dy, x, projection, grads)
        if projection.lora_b is None or low is None:
            continue
        products.append((dy @ projection.lora_b.to(dy.dtype)).mul_(projection.scale))
        if projection.lora_b.requires_grad:
            db = (dy.T @ low).mul_(projection.scale)
            grads[id(projection.lora_b)] = db.to(projection.lora_b.dtype)
    dx = _input_gradient(dys, x, projections, weights) if need_dx else None
    if products:
        low_dy = products[0] if len(products) == 1 else torch.cat(products, 1)
        _adapter_a_gradients(low_dy, x, projections, grads, seed)
        if dx is not None:
            stacked = _stacked_a(projections, x.dtype)
            assert stacked is not None
            if seed is None or max(p.dropout for p in projections) <= 0.0:
                dx.addmm_(low_dy, stacked)
            else:
                dx += _dropped(low_dy @ stacked, projections, seed)
    return dx


def _dense_gradients(dy: Tensor, x: Tensor, projection: Projection, grads: Gradients) -> None:
    weight, bias = projection.weight, projection.bias
    if isinstance(weight, Tensor) and weight.requires_grad:
        grads[id(weight)] = (dy.T @ x).to(weight.dtype)
    if bias is not None and bias.requires_grad:
        grads[id(bias)] = dy.sum(0).to(bias.dtype)


def _adapter_a_gradients(
    low_dy: Tensor,
    x: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    seed: int | None,
) -> None:
    wanted = [p.lora_a for p in projections if p.lora_a is not None]
    if not any(a.requires_grad for a in wanted):
        return
    da = low_dy.T @ _dropped(x, projections, seed)
    for a, part in zip(wanted, da.split([int(a.shape[0]) for a in wanted]), strict=True):
        if a.requires_grad:
            grads[id(a)] = part.to(a.dtype)


def _input_gradient(
    dys: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[Projection],
    weights: list[Tensor] | None,
) -> Tensor:
    weights = weights or dense_weights(projections, x.dtype)
    joined_w, joined_dy = _stacked(weights, 0), _stacked(dys, 1)
    if joined_w is not None and joined_dy is not None:
        return joined_dy @ joined_w
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], seed: int | None, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, xa = project(x, projections, seed)
        ctx.save_for_backward(x, xa)
        ctx.projections, ctx.seed, ctx.params = projections, seed, params
        return tuple(y.contiguous() for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa = ctx.saved_tensors
        grads: Gradients = {}
        dx = project_backward(
            dys, x, ctx.projections, grads, seed=ctx.seed, xa=xa, need_dx=ctx.needs_input_grad[0]
        )
        return dx, None, None, *(grads.get(id(p)) for p in ctx.params)


def _parameters(projections: Sequence[Projection]) -> list[Tensor]:
    return [t for p in projections for t in p.trainable()]


def lora_linear(x: Tensor, projection: Projection, seed: int | None = None) -> Tensor:
    """One projection of x (N, in) -> (N, out); gradients for x, A, B, and W and b if wanted."""
    ys: tuple[Tensor, ...] = _Project.apply(x, (projection,), seed, *_parameters((projection,)))
    return ys[0]


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three attention inputs of x (N, in) in one product each way."""
    group = (q, k, v)
    ys: tuple[Tensor, ...] = _Project.apply(x, group, seed, *_parameters(group))
    return ys[0], ys[1], ys[2]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: tuple[Projection, ...], seed: int | None, *params: Tensor
    ) -> Tensor:
        gate, up, down = group
        (g, u), xa = project(x, (gate, up), seed)
        ctx.save_for_backward(x, g, u, xa)
        ctx.group, ctx.seed, ctx.params = group, seed, params
        return project(swiglu_forward(g, u), (down,), _next(seed))[0][0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, xa = ctx.saved_tensors
        gate, up, down = ctx.group
        grads: Gradients = {}
        joined = torch.cat((g, u), 1)
        g, u = joined.split((g.shape[1], u.shape[1]), 1)
        h = swiglu_forward(g, u)
        dh = project_backward((dy,), h, (down,), grads, seed=_next(ctx.seed))
        assert dh is not None
        swiglu_backward_(dh, g, u)
        dx = project_backward(
            (g, u), x, (gate, up), grads, seed=ctx.seed, xa=xa, need_dx=ctx.needs_input_grad[0]
        )
        return dx, None, None, *(grads.get(id(p)) for p in ctx.params)


def _next(seed: int | None) -> int | None:
    return None if seed is None else seed + 1


def lora_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, seed: int | None = None
) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x (N, in), saving x and the two inner activations only."""
    group = (gate, up, down)
    y: Tensor = _MLP.apply(x, group, seed, *_parameters(group))
    return y
