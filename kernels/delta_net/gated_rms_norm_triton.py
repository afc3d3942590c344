"""Triton kernels of the gated RMSNorm; `gated_rms_norm` has the maths.

A program handles a tile of whole rows: heads of one token, which may lie in a column block of a
wider matrix. dweight needs no atomics: a fixed number of programs each add up a share in registers
while they write the other gradients, and the shares are summed afterwards, so the result does not
depend on the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

MAX_WIDTH = 1024
_DWEIGHT_PROGRAMS = 1024


@jit
def _tile_rows(tile, heads, ROWS: tl.constexpr):
    """The rows of a tile: (token, head of each, whether it exists)."""
    # A tile holds heads of one token: o and z may be strided by token and by head.
    parts = tl.cdiv(heads, ROWS)
    token = tile // parts
    head = (tile - token * parts) * ROWS + tl.arange(0, ROWS)
    return token, head, head < heads


@jit
def gated_rms_norm_forward_kernel(
    o_ptr, z_ptr, weight_ptr, y_ptr, rstd_ptr, heads, width, eps,
    o_token, o_head, z_token, z_head,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head, real = _tile_rows(tl.program_id(0).to(tl.int64), heads, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    # As wide as the tile, so that the weight is loaded in the layout in which it is used.
    columns = tl.broadcast_to(column, (ROWS, BLOCK))
    inside = real[:, None] & (column < width)
    row = token * heads + head
    start = token * o_token + head * o_head
    o = tl.load(o_ptr + start[:, None] + column, mask=inside, other=0.0)
    start = token * z_token + head * z_head
    z = tl.load(z_ptr + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    dtype = o.dtype
    wide = o.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) * (1.0 / width)
    rstd = tl.rsqrt(mean + eps)
    tl.store(rstd_ptr + row, rstd, mask=real)
    # Rounded to the dtype of o twice on the way, as Hugging Face's model does.
    xhat = (wide * rstd[:, None]).to(dtype).to(tl.float32)
    normed = (xhat * weight.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    y = z / (1.0 + tl.exp(-z)) * normed
    tl.store(y_ptr + row[:, None] * width + column, y.to(dtype), mask=inside)


@jit
def _tile_gradients(
    dy_ptr, o_ptr, z_ptr, weight_ptr, rstd_ptr, do_ptr, dz_ptr, tile, heads, width,
    dy_token, dy_head, o_token, o_head, z_token, z_head,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write do and dz of one tile and return what its elements add to dweight."""
    token, head, real = _tile_rows(tile, heads, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    columns = tl.broadcast_to(column, (ROWS, BLOCK))
    inside = real[:, None] & (column < width)
    row = token * heads + head
    start = token * dy_token + head * dy_head
    dy = tl.load(dy_ptr + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    start = token * o_token + head * o_head
    o = tl.load(o_ptr + start[:, None] + column, mask=inside, other=0.0)
    start = token * z_token + head * z_head
    z = tl.load(z_ptr + start[:, None] + column, mask=inside, other=0.0)
    # With rstd 0 a row that does not exist adds nothing to dweight.
    rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    xhat = o.to(tl.float32) * rstd
    gate = z.to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dz = dy * (xhat * weight) * s * (1.0 + gate * (1.0 - s))
    out = row[:, None] * width + column
    tl.store(dz_ptr + out, dz.to(z.dtype), mask=inside)
    d_normed = dy * (gate * s)
    d_xhat = d_normed * weight
    mean = tl.sum(d_xhat * xhat, axis=1)[:, None] * (1.0 / width)
    do = (d_xhat - xhat * mean) * rstd
    tl.store(do_ptr + out, do.to(o.dtype), mask=inside)
    return d_normed * xhat


@jit
def gated_rms_norm_backward_kernel(
    dy_ptr, o_ptr, z_ptr, weight_ptr, rstd_ptr, do_ptr, dz_ptr, partial_ptr,
    tiles, heads, width, dy_token, dy_head, o_token, o_head, z_token, z_head,
    DWEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if not DWEIGHT:
        # Nothing to add up: a program for every tile.
        _tile_gradients(
            dy_ptr, o_ptr, z_ptr, weight_ptr, rstd_ptr, do_ptr, dz_ptr, program, heads, width,
            dy_token, dy_head, o_token, o_head, z_token, z_head, ROWS, BLOCK,
        )  # fmt: skip
    else:
        line = tl.arange(0, BLOCK)
        # A fixed number of programs share the tiles out: the sums do not depend on the GPU.
        dweight = tl.zeros((BLOCK,), dtype=tl.float32)
        for tile in range(program, tiles, tl.num_programs(0)):
            # The interpreter counts in Python's integers; adding 0 in int64 keeps offsets int64.
            share = _tile_gradients(
                dy_ptr, o_ptr, z_ptr, weight_ptr, rstd_ptr, do_ptr, dz_ptr, program * 0 + tile,
                heads, width, dy_token, dy_head, o_token, o_head, z_token, z_head, ROWS, BLOCK,
            )  # fmt: skip
            dweight += tl.sum(share, axis=0)
        tl.store(partial_ptr + program * width + line, dweight, mask=line < width)


def tile(width: int, heads: int) -> tuple[int, int, int]:
    """Rows of one program, its block (both powers of two) and warps.

    Few rows, however narrow: the longer one sum of rows, the more roundings dweight gathers.
    """
    block = next_power_of_2(width)
    rows = min(16, max(1, 2048 // block), next_power_of_2(max(1, heads)))
    return rows, block, min(8, max(1, rows * block // 256))


def _by_head(x: Tensor) -> Tensor:
    """x (..., V) as (tokens, heads, V) with adjacent elements, a view wherever that is possible.

    A matrix has one token, whose heads are its rows.
    """
    if x.dim() < 3:
        x = x.reshape(1, -1, x.shape[-1])
    elif x.dim() > 3:
        x = x.flatten(0, -3)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(weight: Tensor, o: Tensor, *others: Tensor) -> int:
    width = o.shape[-1]
    fits = all(x.shape == o.shape for x in others) and weight.shape == (width,)
    if not fits or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"o, z and their like {[tuple(x.shape) for x in (o, *others)]} and weight "
            f"{tuple(weight.shape)} do not fit; expected (..., V) and (V,) with V <= {MAX_WIDTH}"
        )
    return width


def forward(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (..., V) contiguous in the dtype of o, rstd (..., 1) fp32."""
    width = _check(weight, o, z)
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    rstd = torch.empty((*o.shape[:-1], 1), dtype=torch.float32, device=o.device)
    o, z = _by_head(o), _by_head(z)
    tokens, heads, _ = o.shape
    rows, block, warps = tile(width, heads)
    if y.numel():
        with on_device(o):
            launch(gated_rms_norm_forward_kernel, (tokens * cdiv(heads, rows),))(
                o, z, weight.contiguous(), y, rstd, heads, width, eps, *o.stride()[:2],
                *z.stride()[:2], ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y, rstd


def backward(
    dy: Tensor, o: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """do and dz contiguous in the dtypes of o and z and, if asked for, dw (V,)."""
    width = _check(weight, o, z, dy)
    do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dy, o, z = _by_head(dy), _by_head(o), _by_head(z)
    tokens, heads, _ = o.shape
    rows, block, warps = tile(width, heads)
    tiles = tokens * cdiv(heads, rows)
    programs = min(tiles, _DWEIGHT_PROGRAMS) if need_dweight else tiles
    shares = (programs, width) if need_dweight else (0,)
    partial = torch.empty(shares, dtype=torch.float32, device=o.device)
    if do.numel():
        with on_device(o):
            launch(gated_rms_norm_backward_kernel, (programs,))(
                dy, o, z, weight.contiguous(), rstd.contiguous(), do, dz, partial,
                tiles, heads, width, *dy.stride()[:2], *o.stride()[:2], *z.stride()[:2],
                DWEIGHT=need_dweight, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return do, dz, partial.sum(0).to(weight.dtype) if need_dweight else None
