"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps), over the last dimension.

    rstd = 1 / sqrt(mean_j x_j^2 + eps),   x^ = x * rstd,   y = w * x^
    dx   = rstd * (w dy - x^ * mean_j(w_j dy_j x^_j)),   dw = sum over rows of dy * x^

Arithmetic is fp32 between load and store; x^ is rounded to the dtype of x before the product with
w, as Hugging Face's Llama and Qwen norms do. With `zero_centered` the factor is 1 + w and the
product is rounded once, as their Gemma and Qwen3-Next norms do. With a residual r the norm reads
x + r rounded to the dtype of x, and hands that sum out too: y = norm(x + r), s = x + r.
Source: Zhang & Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.triton_support import cdiv, jit, next_power_of_2, on_device, tl

MAX_WIDTH = 16384
_DWEIGHT_PROGRAMS = 256


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _factor(weight: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(dtype) + 1.0 if zero_centered else weight.to(dtype)


def _forward_reference(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    xhat = wide * rstd
    if zero_centered:
        return xhat.mul_(_factor(weight, wide.dtype, True)).to(x.dtype), rstd
    return xhat.to(x.dtype).mul_(weight.to(x.dtype)), rstd


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    zero_centered: bool,
    dresidual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One temporary of the size of x: it holds dy x, then dx."""
    wide, dy_wide = _wide(x), _wide(dy)
    factor = _factor(weight, wide.dtype, zero_centered)
    work = dy_wide * wide
    dweight = None
    if need_dweight:
        dweight = torch.mv(work.flatten(0, -2).T, rstd.flatten()).to(weight.dtype)
    mean = torch.matmul(work, factor).unsqueeze(-1).mul_(rstd.square()).div_(x.shape[-1])
    torch.mul(dy_wide, factor, out=work)
    work.addcmul_(wide, mean, value=-1).mul_(rstd)
    if dresidual is not None:
        work.add_(dresidual)
    return work.to(x.dtype), dweight


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    rows,
    width,
    x_groups,
    x_outer,
    x_inner,
    r_groups,
    r_outer,
    r_inner,
    eps,
    ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    dense = row[:, None] * width + column
    start = row // x_groups * x_outer + row % x_groups * x_inner
    x = tl.load(x_ptr + start[:, None] + column, mask=inside, other=0.0)
    dtype = x.dtype
    if ADD:
        start = row // r_groups * r_outer + row % r_groups * r_inner
        r = tl.load(residual_ptr + start[:, None] + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + dense, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / width
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    xhat = wide * rstd[:, None]
    if ZERO_CENTERED:
        y = xhat * (weight.to(tl.float32) + 1.0)
    else:
        y = xhat.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
    tl.store(y_ptr + dense, y.to(dtype), mask=inside)


@jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    width,
    dy_groups,
    dy_outer,
    dy_inner,
    x_groups,
    x_outer,
    x_inner,
    dx_groups,
    dx_outer,
    dx_inner,
    programs,
    ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)
        start = row // dy_groups * dy_outer + row % dy_groups * dy_inner
        dy = tl.load(dy_ptr + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        start = row // x_groups * x_outer + row % x_groups * x_inner
        x = tl.load(x_ptr + start[:, None] + column, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
        if ZERO_CENTERED:
            factor = weight.to(tl.float32) + 1.0
        else:
            factor = weight.to(x.dtype).to(tl.float32)
        xhat = x.to(tl.float32) * rstd
        if DWEIGHT:
            dweight += tl.sum(dy * xhat, axis=0)
        wdy = dy * factor
        mean = tl.sum(wdy * xhat, axis=1)[:, None] / width
        dx = (wdy - xhat * mean) * rstd
        if ADD:
            above = tl.load(dresidual_ptr + row[:, None] * width + column, mask=inside, other=0.0)
            dx += above.to(tl.float32)
        start = row // dx_groups * dx_outer + row % dx_groups * dx_inner
        tl.store(dx_ptr + start[:, None] + column, dx.to(x.dtype), mask=inside)
    if DWEIGHT:
        column = tl.arange(0, BLOCK)
        tl.store(partial_ptr + program * width + column, dweight, mask=column < width)


def tile(width: int) -> tuple[int, int, int]:
    """Rows of one program, its block (a power of two) and warps, for rows of `width`."""
    block = next_power_of_2(width)
    rows = max(1, 2048 // block)
    return rows, block, min(32, max(4, rows * block // 512))


def _layout(x: Tensor) -> tuple[int, int, int]:
    """How row i of x lies: i // groups * outer + i % groups * inner, elements adjacent."""
    if x.dim() <= 2:
        return 1, (x.stride(0) if x.dim() == 2 else 0), 0
    groups, outer, inner = x.shape[-2], x.stride(-3), x.stride(-2)
    return (1, inner, 0) if outer == groups * inner else (groups, outer, inner)


def _rowwise(x: Tensor) -> Tensor:
    """x itself where `_layout` can describe it, else a contiguous copy."""
    known = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if known and (x.dim() <= 3 or x.is_contiguous()) else x.contiguous()


def _checked_width(x: Tensor, weight: Tensor) -> int:
    width = x.shape[-1]
    if weight.shape != (width,) or width > MAX_WIDTH:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; expected (..., H) "
            f"and (H,) with H <= {MAX_WIDTH}"
        )
    return width


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = _checked_width(x, weight)
    x = _rowwise(x)
    other = x if residual is None else _rowwise(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows, block, warps = tile(width)
    with on_device(x):
        _forward_kernel[(cdiv(rstd.numel(), rows),)](
            x, other, weight, y, total, rstd, rstd.numel(), width, *_layout(x), *_layout(other),
            eps, ADD=residual is not None, ZERO_CENTERED=zero_centered, ROWS=rows, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


def _backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    zero_centered: bool,
    dresidual: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    width, count = _checked_width(x, weight), rstd.numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if _rowwise(dx) is not dx:
        raise ValueError(f"out has strides {dx.stride()}; its rows must be adjacent elements")
    dy, x = _rowwise(dy), _rowwise(x)
    above = dy if dresidual is None else dresidual.contiguous()
    rows, block, warps = tile(width)
    programs = cdiv(count, rows)
    partial = rstd
    if need_dweight:
        programs = min(programs, _DWEIGHT_PROGRAMS)
        partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(programs,)](
            dy, x, weight, rstd.contiguous(), above, dx, partial, count, width, *_layout(dy),
            *_layout(x), *_layout(dx), programs, ADD=dresidual is not None,
            ZERO_CENTERED=zero_centered, DWEIGHT=need_dweight, ROWS=rows, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dweight else None


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """x (..., H), weight (H,) -> y (..., H) in the dtype of x, rstd (..., 1) in fp32 or wider.

    Raises `ValueError` on a GPU where H is beyond `MAX_WIDTH` or does not fit the weight.
    """
    if use_triton(x):
        y, _, rstd = _forward_triton(x, None, weight, eps, zero_centered)
        return y, rstd
    return _forward_reference(x, weight, eps, zero_centered)


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x + residual), the sum itself (both (..., H), dtype of x), and rstd (..., 1)."""
    if use_triton(x):
        return _forward_triton(x, residual, weight, eps, zero_centered)
    total = (x + residual).to(x.dtype)
    y, rstd = _forward_reference(total, weight, eps, zero_centered)
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    need_dweight: bool = False,
    zero_centered: bool = False,
    dresidual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x (shape and dtype of x) and, if asked for, weight (H,).

    `dresidual` (..., H), the gradient that reaches x past the norm, is added to dx before it is
    rounded. `out` receives dx and may be dy itself; its rows may be strided.
    """
    if use_triton(x):
        return _backward_triton(dy, x, weight, rstd, need_dweight, zero_centered, dresidual, out)
    dx, dweight = _backward_reference(
        dy, x, weight, rstd, need_dweight, zero_centered, dresidual
    )
    return (dx if out is None else out.copy_(dx)), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, x: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, zero_centered=zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[no-untyped-def,override]
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy,
            x,
            weight,
            rstd,
            need_dweight=ctx.needs_input_grad[1],
            zero_centered=ctx.zero_centered,
        )
        return dx, dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = add_rms_norm_forward(
            x, residual, weight, eps, zero_centered=zero_centered
        )
        ctx.save_for_backward(total, weight, rstd)
        ctx.zero_centered = zero_centered
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, dtotal: Tensor):  # type: ignore[no-untyped-def,override]
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy,
            total,
            weight,
            rstd,
            need_dweight=ctx.needs_input_grad[2],
            zero_centered=ctx.zero_centered,
            dresidual=dtotal,
        )
        return dx, dx, dweight, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> Tensor:
    """RMSNorm with gradients for x (..., H) and weight (H,); returns the dtype of x."""
    y: Tensor = _RMSNorm.apply(x, weight, eps, zero_centered)
    return y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, with gradients for all three tensors."""
    y, total = _AddRMSNorm.apply(x, residual, weight, eps, zero_centered)
    return y, total
