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
def _rows(step, part, groups, GROUPED: tl.constexpr, ROWS: tl.constexpr):
    """Which rows a program handles: (outer, inner of each, whether it exists)."""
    if GROUPED:
        outer = step
        inner = part * ROWS + tl.arange(0, ROWS)
    else:
        outer = step * 0
        inner = step * ROWS + tl.arange(0, ROWS)
    return outer, inner, inner < groups


@jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    groups, width, eps, x_outer, x_inner, r_outer, r_inner,
    GROUPED: tl.constexpr,
    ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    step, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    outer, inner, real = _rows(step, part, groups, GROUPED, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    # As wide as the tile, so that the weight is loaded in the layout in which it is used.
    columns = tl.broadcast_to(column, (ROWS, BLOCK))
    inside = real[:, None] & (column < width)
    row = outer * groups + inner
    start = outer * x_outer + inner * x_inner
    x = tl.load(x_ptr + start[:, None] + column, mask=inside, other=0.0)
    dtype = x.dtype
    if ADD:
        start = outer * r_outer + inner * r_inner
        r = tl.load(residual_ptr + start[:, None] + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row[:, None] * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) * (1.0 / width)
    rstd = tl.rsqrt(mean + eps)
    tl.store(rstd_ptr + row, rstd, mask=real)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    xhat = wide * rstd[:, None]
    if ZERO_CENTERED:
        y = xhat * (weight.to(tl.float32) + 1.0)
    else:
        y = xhat.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
    tl.store(y_ptr + row[:, None] * width + column, y.to(dtype), mask=inside)


@jit
def _differentiate(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, step, part,
    groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    GROUPED: tl.constexpr,
    ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dx of one tile of rows and return dy * x^ of its elements."""
    outer, inner, real = _rows(step, part, groups, GROUPED, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    # As wide as the tile, so that the weight is loaded in the layout in which it is used.
    columns = tl.broadcast_to(column, (ROWS, BLOCK))
    inside = real[:, None] & (column < width)
    row = outer * groups + inner
    start = outer * dy_outer + inner * dy_inner
    dy = tl.load(dy_ptr + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    start = outer * x_outer + inner * x_inner
    x = tl.load(x_ptr + start[:, None] + column, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if ZERO_CENTERED:
        factor = weight.to(tl.float32) + 1.0
    else:
        factor = weight.to(x.dtype).to(tl.float32)
    xhat = x.to(tl.float32) * rstd
    wdy = dy * factor
    mean = tl.sum(wdy * xhat, axis=1)[:, None] * (1.0 / width)
    dx = (wdy - xhat * mean) * rstd
    if ADD:
        above = tl.load(dresidual_ptr + row[:, None] * width + column, mask=inside, other=0.0)
        dx += above.to(tl.float32)
    start = outer * dx_outer + inner * dx_inner
    tl.store(dx_ptr + start[:, None] + column, dx.to(x.dtype), mask=inside)
    return dy * xhat


@jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr,
    steps, groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    GROUPED: tl.constexpr,
    ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    DWEIGHT: tl.constexpr,
    REGISTERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if not DWEIGHT:
        _differentiate(
            dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, program, part,
            groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
            GROUPED, ADD, ZERO_CENTERED, ROWS, BLOCK,
        )  # fmt: skip
    else:
        # This program's share of dweight, in registers; for the widest rows in (cached) memory.
        line = tl.arange(0, BLOCK)
        partial = partial_ptr + (program * tl.num_programs(1) + part) * width + line
        dweight = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in range(program, steps, tl.num_programs(0)):
            # The interpreter counts in Python's integers; adding 0 in int64 keeps offsets int64.
            share = _differentiate(
                dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, program * 0 + step,
                part, groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
                GROUPED, ADD, ZERO_CENTERED, ROWS, BLOCK,
            )  # fmt: skip
            share = tl.sum(share, axis=0)
            if REGISTERS:
                dweight += share
            else:
                share += tl.load(partial, mask=line < width, other=0.0)
                tl.store(partial, share, mask=line < width)
        if REGISTERS:
            tl.store(partial, dweight, mask=line < width)


def tile(width: int, groups: int) -> tuple[int, int, int]:
    """Rows of one program, its block (both powers of two) and warps."""
    block = next_power_of_2(width)
    rows = min(max(1, 2048 // block), next_power_of_2(max(1, groups)))
    return rows, block, min(16, max(4, rows * block // 1024))


def dweight_tile(width: int, groups: int) -> tuple[int, int, int, bool]:
    """As `tile` with dweight; last, whether the registers have room for a program's share of it."""
    rows, block, _ = tile(width, groups)
    registers = block <= 8192
    return rows, block, max(4, rows * block // 512) if registers else 8, registers


def _rowwise(x: Tensor) -> Tensor:
    """x itself where its rows lie at outer * a + inner * b, else a contiguous copy."""
    known = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if known and (x.dim() <= 3 or x.is_contiguous()) else x.contiguous()


def _layout(*tensors: Tensor) -> tuple[bool, int, int, list[int]]:
    """How the rows of equally shaped tensors lie: whether grouped, outer count, groups, strides.

    Row (outer, inner) of a tensor begins at outer * its first stride + inner * its second. Rows
    that are evenly spaced in every tensor are not grouped: outer is 0 alone.
    """
    shape = tensors[0].shape
    rows = tensors[0].numel() // max(1, shape[-1])
    if len(shape) <= 2:
        strides = [(0, x.stride(0) if x.dim() == 2 else 0) for x in tensors]
        return False, 1, rows, [s for pair in strides for s in pair]
    strides = [(x.stride(-3), x.stride(-2)) for x in tensors]
    if all(outer == shape[-2] * inner for outer, inner in strides):
        return False, 1, rows, [s for _, inner in strides for s in (0, inner)]
    return True, rows // max(1, shape[-2]), shape[-2], [s for pair in strides for s in pair]


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
    grouped, outer, groups, strides = _layout(x, other)
    rows, block, warps = tile(width, groups)
    tiles = cdiv(groups, rows)
    if x.numel():
        with on_device(x):
            rms_norm_forward_kernel[(outer, tiles) if grouped else (tiles, 1)](
                x, other, weight, y, total, rstd, groups, width, eps, *strides, GROUPED=grouped,
                ADD=residual is not None, ZERO_CENTERED=zero_centered, ROWS=rows, BLOCK=block,
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
    width = _checked_width(x, weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if dx.shape != x.shape or _rowwise(dx) is not dx:
        raise ValueError(
            f"out is {tuple(dx.shape)} with strides {dx.stride()}; expected {tuple(x.shape)} with "
            "the elements of a row adjacent"
        )
    dy, x = _rowwise(dy), _rowwise(x)
    above = dy if dresidual is None else dresidual.contiguous()
    grouped, outer, groups, strides = _layout(dy, x, dx)
    rows, block, warps, registers = (*tile(width, groups), True)
    if need_dweight:
        rows, block, warps, registers = dweight_tile(width, groups)
    tiles = cdiv(groups, rows)
    steps, parts = (outer, tiles) if grouped else (tiles, 1)
    programs, partial = steps, rstd
    if need_dweight:
        programs = min(steps, max(1, _DWEIGHT_PROGRAMS // parts))
        partial = torch.zeros((programs * parts, width), dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            rms_norm_backward_kernel[(programs, parts)](
                dy, x, weight, rstd.contiguous(), above, dx, partial, steps, groups, width,
                *strides, GROUPED=grouped, ADD=dresidual is not None,
                ZERO_CENTERED=zero_centered, DWEIGHT=need_dweight, REGISTERS=registers, ROWS=rows,
                BLOCK=block, num_warps=warps,
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
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            y, rstd = rms_norm_forward(x, weight, eps, zero_centered=zero_centered)
            total = x
        else:
            y, total, rstd = add_rms_norm_forward(
                x, residual, weight, eps, zero_centered=zero_centered
            )
        ctx.save_for_backward(total, weight, rstd)
        ctx.zero_centered, ctx.added = zero_centered, residual is not None
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, dtotal: Tensor):  # type: ignore[no-untyped-def]
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy,
            total,
            weight,
            rstd,
            need_dweight=ctx.needs_input_grad[2],
            zero_centered=ctx.zero_centered,
            dresidual=dtotal if ctx.added else None,
        )
        return dx, dx if ctx.added else None, dweight, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> Tensor:
    """RMSNorm with gradients for x (..., H) and weight (H,); returns the dtype of x."""
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, zero_centered)[0]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, with gradients for all three tensors."""
    y, total = _RMSNorm.apply(x, residual, weight, eps, zero_centered)
    return y, total
