"""Causal depthwise convolution over packed documents, then SiLU.

x (N, C) holds the tokens of all documents one after another, w (C, J) or (C, 1, J) the taps:

    a_t = sum_j w[:, J - 1 - j] x_{t - j},   j = 0 .. J - 1,   y = silu(a)
    da = dy silu'(a),   dx_s = sum_j w[:, J - 1 - j] da_{s + j}
    dw[:, J - 1 - j] = sum_t da_t x_{t - j}

Taps stop at the start of a document, or read the last J - 1 inputs of what came before where a
state is given. The sum a is formed again in backward. The kernels for a GPU are in
`kernels.delta_net.causal_conv1d_triton`. Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752) for its
place in the layer; the maths is the convolution's own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.attention import AttentionPlan
from kernels.delta_net import causal_conv1d_triton
from kernels.delta_net.operands import wide
from kernels.runtime.dispatch import use_triton


def _taps(weight: Tensor) -> Tensor:
    """(J, C) fp32 or wider, row j the tap that reads x_{t - j}."""
    return wide(weight).reshape(weight.shape[0], -1).T.flip(0)


def _convolve(x: Tensor, taps: Tensor, bounds: tuple[int, ...], state: Tensor | None) -> Tensor:
    """a (N, C), fp32 or wider."""
    out = x * taps[0]
    for document, (start, end) in enumerate(pairwise(bounds)):
        for j in range(1, taps.shape[0]):
            if end - start > j:
                out[start + j : end].addcmul_(x[start : end - j], taps[j])
            if state is not None:
                rows = min(j, end - start)
                before = state[document, state.shape[1] - j :][:rows]
                out[start : start + rows].addcmul_(before, taps[j])
    return out


def _check(x: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> None:
    if x.shape[0] != bounds[-1] or weight.shape[0] != x.shape[1] or weight.numel() % x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit {bounds[-1]} tokens; "
            "expected (N, C) and (C, J) or (C, 1, J)"
        )


def causal_conv1d_forward(
    x: Tensor, weight: Tensor, bounds: tuple[int, ...], state: Tensor | None = None
) -> Tensor:
    """y (N, C) in the dtype of x.

    weight (C, J) or (C, 1, J); `bounds` as `AttentionPlan.bounds`; `state` (D, J - 1, C) the inputs
    before every document, None for none. Raises `ValueError` if the shapes do not fit.
    """
    _check(x, weight, bounds)
    if use_triton(x):
        return causal_conv1d_triton.forward(x, weight, bounds, state)
    wide_state = None if state is None else wide(state)
    return F.silu(_convolve(wide(x), _taps(weight), bounds, wide_state)).to(x.dtype)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bounds: tuple[int, ...], *, need_dweight: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dx (N, C) in the dtype of x and, if asked for, dw in the shape and dtype of weight.

    Raises `ValueError` if the shapes do not fit.
    """
    _check(x, weight, bounds)
    if dy.shape != x.shape:
        raise ValueError(f"dy {tuple(dy.shape)} does not fit x {tuple(x.shape)}")
    if use_triton(x):
        return causal_conv1d_triton.backward(dy, x, weight, bounds, need_dweight)
    values, taps = wide(x), _taps(weight)
    da = torch.ops.aten.silu_backward(wide(dy), _convolve(values, taps, bounds, None))
    dx = da * taps[0]
    d_taps = torch.zeros_like(taps)
    if need_dweight:
        d_taps[0] = (da * values).sum(0)
    for start, end in pairwise(bounds):
        for j in range(1, min(taps.shape[0], end - start)):
            dx[start : end - j].addcmul_(da[start + j : end], taps[j])
            if need_dweight:
                d_taps[j] += (da[start + j : end] * values[start : end - j]).sum(0)
    dweight = d_taps.flip(0).T.reshape(weight.shape).to(weight.dtype) if need_dweight else None
    return dx.to(x.dtype), dweight


def final_conv_state(
    x: Tensor, taps: int, bounds: tuple[int, ...], state: Tensor | None = None
) -> Tensor:
    """The last J - 1 inputs of every document (D, J - 1, C), zero or `state` before its start."""
    documents = list(pairwise(bounds))
    if state is None:
        state = x.new_zeros(len(documents), taps - 1, x.shape[1])
    return torch.stack(
        [
            torch.cat((state[document], x[start:end]))[end - start :]
            for document, (start, end) in enumerate(documents)
        ]
    )


def causal_conv1d_step(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """y (B, C) for the next token of B sequences; `state` (B, J - 1, C) moves on in place."""
    window = torch.cat((state, x.unsqueeze(1).to(state.dtype)), 1)
    state.copy_(window[:, 1:])
    return F.silu((wide(window) * _taps(weight).flip(0)).sum(1)).to(x.dtype)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bounds: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return causal_conv1d_forward(x, weight, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[1]
        dx, dweight = causal_conv1d_backward(dy, x, weight, ctx.bounds, need_dweight=need)
        return dx, dweight, None


def causal_conv1d(x: Tensor, weight: Tensor, plan: AttentionPlan) -> Tensor:
    """silu(causal depthwise convolution) of x (N, C), with gradients for x and weight."""
    y: Tensor = _CausalConv1d.apply(x, weight, plan.bounds)
    return y
