"""SwiGLU: h = silu(gate) * up, silu(g) = g * sigmoid(g).

    s = sigmoid(g):   dup = dh * g s,   dgate = dh * up * s (1 + g (1 - s))

The backward pass overwrites gate and up with their gradients: after it nobody needs their values.
It may leave h in the memory of dh, for the gradients of what read h, so that forward's h is neither
saved nor computed by a launch of its own. All tensors may be column blocks of wider matrices, such
as one (N, 2I) matrix of gate and up. Arithmetic is fp32 between load and store.
Source: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.elementwise.swiglu_compiled import swiglu_backward_rows_, swiglu_forward_rows
from kernels.runtime.dispatch import use_triton
from kernels.runtime.lanes import takes_lanes
from kernels.runtime.simulation import equal_parts
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

_REFERENCE_ELEMENTS = 1 << 17


def _forward_reference(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype in (torch.float32, torch.float64):
        return F.silu(gate).mul_(up)
    return F.silu(gate.float()).mul_(up.float()).to(gate.dtype)


def _backward_reference_(dh: Tensor, gate: Tensor, up: Tensor, keep_h: bool) -> None:
    """A few rows at a time, so that the temporaries stay in the processor's cache."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    rows = max(1, _REFERENCE_ELEMENTS // max(1, gate.shape[1]))
    for start in equal_parts(range(0, gate.shape[0], rows)):
        dh_part, gate_part, up_part = (x[start : start + rows] for x in (dh, gate, up))
        g, u, d = gate_part.to(wide), up_part.to(wide), dh_part.to(wide)
        dsilu, silu = d * u, F.silu(g)
        if keep_h:
            h = silu * u
        torch.mul(silu, d, out=u)
        torch.ops.aten.silu_backward.grad_input(dsilu, g, grad_input=g)
        if g is not gate_part:
            gate_part.copy_(g)
            up_part.copy_(u)
        if keep_h:
            dh_part.copy_(h)


@jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, h_ptr, width, gate_row, up_row, h_row, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    # Strides by row: gate and up may be column blocks of one matrix.
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # Where exp overflows, the quotient is 0, which is silu's limit.
    h = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(h_ptr + row * h_row + column, h.to(gate.dtype), mask=inside)


@jit
def swiglu_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, width, dh_row, gate_row, up_row,
    KEEP_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dh_at = dh_ptr + row * dh_row + column
    gate_at, up_at = gate_ptr + row * gate_row + column, up_ptr + row * up_row + column
    dh = tl.load(dh_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=inside, other=0.0)
    up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    # In place: this program is the only reader of these elements, and has read them.
    tl.store(gate_at, dgate.to(dtype), mask=inside)
    tl.store(up_at, (dh * silu).to(dtype), mask=inside)
    if KEEP_H:
        tl.store(dh_at, (silu * up).to(dtype), mask=inside)


def tile(width: int) -> tuple[int, int]:
    """Columns of one program (a power of two) and its warps, for rows of `width`."""
    return min(2048, next_power_of_2(width)), 4


def _check(gate: Tensor, *others: Tensor) -> None:
    for x in (gate, *others):
        if x.dim() != 2 or x.shape != gate.shape or (x.stride(1) != 1 and x.shape[1] > 1):
            raise ValueError(
                f"shapes {[tuple(t.shape) for t in (gate, *others)]}, strides "
                f"{[t.stride() for t in (gate, *others)]}; expected equal (N, I), columns adjacent"
            )


def _forward_triton(gate: Tensor, up: Tensor, out: Tensor | None) -> Tensor:
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _check(gate, up, h)
    block, warps = tile(gate.shape[1])
    if h.numel():
        with on_device(gate):
            launch(swiglu_forward_kernel, (gate.shape[0], cdiv(gate.shape[1], block)))(
                gate, up, h, gate.shape[1], gate.stride(0), up.stride(0), h.stride(0),
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return h


def _backward_triton_(dh: Tensor, gate: Tensor, up: Tensor, keep_h: bool) -> None:
    _check(gate, up, dh)
    block, warps = tile(gate.shape[1])
    if gate.numel():
        with on_device(gate):
            launch(swiglu_backward_kernel, (gate.shape[0], cdiv(gate.shape[1], block)))(
                dh, gate, up, gate.shape[1], dh.stride(0), gate.stride(0), up.stride(0),
                KEEP_H=keep_h, BLOCK=block, num_warps=warps,
            )  # fmt: skip


def swiglu_forward(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gate, up (N, I) -> h (N, I) in the dtype of gate: contiguous, or `out`.

    The rows of `out` may be those of a wider matrix, whose other columns stay as they are; it may
    be gate or up itself. Raises `ValueError` on a GPU where the shapes differ or columns lie apart.
    """
    if use_triton(gate):
        return _forward_triton(gate, up, out)
    if takes_lanes(gate, up, *(() if out is None else (out,))):
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
        if not h.is_meta:
            swiglu_forward_rows(gate, up, h)
        return h
    h = _forward_reference(gate, up)
    return h if out is None else out.copy_(h)


def swiglu_backward_(
    dh: Tensor, gate: Tensor, up: Tensor, *, keep_h: bool = False
) -> tuple[Tensor, Tensor]:
    """Overwrite gate and up (N, I) with their gradients for dh (N, I).

    With `keep_h`, dh holds h = silu(gate) * up afterwards, as `swiglu_forward` rounds it; else it
    stays as it is. The rows of each may be those of a wider matrix.
    """
    if use_triton(gate):
        _backward_triton_(dh, gate, up, keep_h)
    elif takes_lanes(gate, up, dh):
        if not gate.is_meta:
            swiglu_backward_rows_(dh, gate, up, keep_h)
    else:
        _backward_reference_(dh, gate, up, keep_h)
    return gate, up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        return swiglu_backward_(dh.contiguous(), gate.clone(), up.clone())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with gradients for both, each (N, I)."""
    h: Tensor = _SwiGLU.apply(gate, up)
    return h
