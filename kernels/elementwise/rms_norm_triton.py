"""Triton kernels of RMSNorm; `rms_norm` has the maths.

A program handles a tile of whole rows (many short ones, one long one), forward and dx. Rows may lie
anywhere: as plain rows, or grouped, such as the heads of a column block of a wider matrix. dweight
needs no atomics: a fixed number of programs each add up a share in registers while they write dx,
and the shares are summed afterwards, so the result does not depend on the GPU. Rows too wide for
that have a kernel that sums dweight alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

MAX_WIDTH = 16384
FUSED_DWEIGHT_WIDTH = 8192
"""Beyond it a row, its gradient and its share of dweight do not fit the registers."""
_DWEIGHT_PROGRAMS = 256


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
    groups, width, eps, x_outer, x_inner, r_outer, r_inner, y_outer, y_inner, sum_outer, sum_inner,
    GROUPED: tl.constexpr, ADD: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROWS: tl.constexpr,
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
        # The norm reads the rounded sum: it is what the rest of the model sees.
        x = (x.to(tl.float32) + r.to(tl.float32)).to(dtype)
        # Stored after both are loaded: the sum may lie over either.
        start = outer * sum_outer + inner * sum_inner
        tl.store(sum_ptr + start[:, None] + column, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) * (1.0 / width)
    rstd = tl.rsqrt(mean + eps)
    tl.store(rstd_ptr + row, rstd, mask=real)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    # Families differ in where the product with w is rounded.
    xhat = wide * rstd[:, None]
    if ZERO_CENTERED:
        y = xhat * (weight.to(tl.float32) + 1.0)
    else:
        y = xhat.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
    start = outer * y_outer + inner * y_inner
    tl.store(y_ptr + start[:, None] + column, y.to(dtype), mask=inside)


@jit
def _tile_gradients(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, step, part,
    groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner, r_outer, r_inner,
    GROUPED: tl.constexpr, ADD: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROWS: tl.constexpr,
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
    # With rstd 0 a row that does not exist adds nothing to dweight.
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
        # Added before the rounding, not to a rounded dx in another launch.
        start = outer * r_outer + inner * r_inner
        above = tl.load(dresidual_ptr + start[:, None] + column, mask=inside, other=0.0)
        dx += above.to(tl.float32)
    start = outer * dx_outer + inner * dx_inner
    tl.store(dx_ptr + start[:, None] + column, dx.to(x.dtype), mask=inside)
    return dy * xhat


@jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr,
    steps, groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    r_outer, r_inner,
    GROUPED: tl.constexpr, ADD: tl.constexpr, ZERO_CENTERED: tl.constexpr, DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if not DWEIGHT:
        # Nothing to add up: a program for every tile.
        _tile_gradients(
            dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, program, part,
            groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
            r_outer, r_inner,
            GROUPED, ADD, ZERO_CENTERED, ROWS, BLOCK,
        )  # fmt: skip
    else:
        # A fixed number of programs share the tiles out: the sums do not depend on the GPU.
        line = tl.arange(0, BLOCK)
        dweight = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in range(program, steps, tl.num_programs(0)):
            # The interpreter counts in Python's integers; adding 0 in int64 keeps offsets int64.
            share = _tile_gradients(
                dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, program * 0 + step,
                part, groups, width, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
                r_outer, r_inner,
                GROUPED, ADD, ZERO_CENTERED, ROWS, BLOCK,
            )  # fmt: skip
            dweight += tl.sum(share, axis=0)
        partial = partial_ptr + (program * tl.num_programs(1) + part) * width
        tl.store(partial + line, dweight, mask=line < width)


@jit
def rms_norm_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, partial_ptr, rows, width, dy_row, x_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A sum for every element of the tile: threads exchange theirs once, after the loop.
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (program * 0 + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_row + column, mask=inside, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_row + column, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dweight += dy.to(tl.float32) * x.to(tl.float32) * rstd
    partial = partial_ptr + program * width + column
    tl.store(partial, tl.sum(dweight, axis=0), mask=column < width)


def tile(
    width: int, groups: int, itemsize: int, *, backward: bool = False, dweight: bool = False
) -> tuple[int, int, int]:
    """Rows of one program, its block (both powers of two) and warps.

    The share of a thread is the largest for which no configuration spills a register.
    """
    block = next_power_of_2(width)
    rows = min(max(1, 2048 // block), next_power_of_2(max(1, groups)))
    if (itemsize > 2 and not dweight) or (dweight and block <= 256):
        share = 8
    else:
        share = 16 if backward or width > 8192 else 32
    return rows, block, min(32, max(4, rows * block // (32 * share)))


def dweight_tile() -> tuple[int, int, int]:
    """Rows, columns and warps of a program that sums dweight alone."""
    return 16, 128, 4


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


def _target(given: Tensor | None, like: Tensor, name: str) -> Tensor:
    """Where a result goes: `given`, which must be writable in place, or new memory."""
    if given is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if given.shape != like.shape or given.dtype != like.dtype or _rowwise(given) is not given:
        raise ValueError(
            f"{name} is {tuple(given.shape)} {given.dtype} with strides {given.stride()}; expected "
            f"{tuple(like.shape)} {like.dtype} with the elements of a row adjacent"
        )
    return given


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    zero_centered: bool,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    width = _checked_width(x, weight)
    y = _target(out, x, "out")
    total = y if residual is None else _target(total, x, "total")
    x = _rowwise(x)
    other = x if residual is None else _rowwise(residual)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    grouped, outer, groups, strides = _layout(x, other, y, total)
    rows, block, warps = tile(width, groups, x.itemsize)
    tiles = cdiv(groups, rows)
    if x.numel():
        with on_device(x):
            launch(rms_norm_forward_kernel, (outer, tiles) if grouped else (tiles, 1))(
                x, other, weight, y, total, rstd, groups, width, eps, *strides, GROUPED=grouped,
                ADD=residual is not None, ZERO_CENTERED=zero_centered, ROWS=rows, BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
    return y, total, rstd


def backward(
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
    dx = _target(out, x, "out")
    dy, x = _rowwise(dy), _rowwise(x)
    above = dy if dresidual is None else _rowwise(dresidual)
    rstd = rstd.contiguous()
    grouped, outer, groups, strides = _layout(dy, x, dx, above)
    fused = need_dweight and width <= FUSED_DWEIGHT_WIDTH
    rows, block, warps = tile(width, groups, x.itemsize, backward=True, dweight=fused)
    tiles = cdiv(groups, rows)
    steps, parts = (outer, tiles) if grouped else (tiles, 1)
    programs, partial = steps, rstd
    if fused:
        programs = min(steps, max(1, _DWEIGHT_PROGRAMS // parts))
        partial = torch.empty((programs * parts, width), dtype=torch.float32, device=x.device)
    elif need_dweight:
        # Before dx is written: dx may lie over dy.
        partial = _dweight_alone(dy.flatten(0, -2), x.flatten(0, -2), rstd)
    if x.numel():
        with on_device(x):
            launch(rms_norm_backward_kernel, (programs, parts))(
                dy, x, weight, rstd, above, dx, partial, steps, groups, width, *strides,
                GROUPED=grouped, ADD=dresidual is not None, ZERO_CENTERED=zero_centered,
                DWEIGHT=fused, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dweight else None


def _dweight_alone(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Partial sums of dweight (programs, H) for dy and x (rows, H)."""
    count, width = x.shape
    rows, block, warps = dweight_tile()
    programs = min(cdiv(count, rows), _DWEIGHT_PROGRAMS // 8)
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if count:
        with on_device(x):
            launch(rms_norm_dweight_kernel, (programs, cdiv(width, block)))(
                dy, x, rstd, partial, count, width, dy.stride(0), x.stride(0),
                ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return partial
