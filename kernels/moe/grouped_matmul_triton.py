"""Triton kernels of grouped products, with dense and NF4 weights.

Rows are sorted by expert. Tiles of 64 rows never cross an expert: a table built on the device gives
expert and first row of every tile, so that no launch waits for the host. There are at most
M / 64 + E tiles; programs beyond the last return at once. Rows may be gathered: sorted row m of the
left operand is row rows[m] of a matrix (N, width), which is read in place.

An NF4 weight (E, out, in) in the planar order (`kernels.nf4.planar`, rows of all experts one below
the other) is decoded between memory and tensor core:

    y^T = W x^T      four products of width 16 per block of 64 columns, W from registers
    dx = dy W        the four planes of a block are joined to a tile (out, 64), one product

Sums are fp32. A result is rounded once, or added to what is there and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.projection import aligned
from kernels.moe.gathered import Gathered
from kernels.nf4.decode_ptx import INTERPRETED, block_scale, decode_planes
from kernels.nf4.dequantize_triton import nested_arguments, nested_shift, triton_dtype
from kernels.nf4.planar import BLOCK, PlanarNF4Weight
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

BLOCK_M = 64
BLOCK_N = 128
BLOCK_K = 64


def tile_table(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Expert and first row (int32) of every tile of 64 rows; expert E where there is no tile."""
    experts = offsets.shape[0] - 1
    tiles = (offsets.diff() + (BLOCK_M - 1)) // BLOCK_M
    ends = tiles.cumsum(0)
    index = torch.arange(cdiv(rows, BLOCK_M) + experts, device=offsets.device)
    expert = torch.searchsorted(ends, index, right=True)
    within = index - (ends - tiles)[expert.clamp(max=experts - 1)]
    first = offsets[expert] + within * BLOCK_M
    return expert.to(torch.int32), first.to(torch.int32)


@jit
def _source(row, inside, gather, GATHER: tl.constexpr):
    """The rows of the left operand that sorted rows read."""
    if GATHER:
        return tl.load(gather + row, mask=inside, other=0).to(tl.int64)
    else:
        return row


@jit
def _rows(tile_row, offsets, gather, tile, expert, GATHER: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sorted rows of a tile, which of them there are, and the rows that they read."""
    row = tl.load(tile_row + tile).to(tl.int64) + tl.arange(0, BLOCK_M)
    inside = row < tl.load(offsets + expert + 1)
    return row, inside, _source(row, inside, gather, GATHER)


@jit
def _finish(out, row, inside, column, width, ldo, acc, scale, ACCUMULATE: tl.constexpr):
    """Store scale * acc (rows, columns), or add it to what is there."""
    target = out + row[:, None] * ldo + column[None, :]
    mask = inside[:, None] & (column < width)[None, :]
    acc *= scale
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@jit
def dense_kernel(
    x, weight, out, gather, offsets, tile_expert, tile_row, experts, width, depth, ldx, ldo,
    w_expert, w_depth, w_width, scale,
    GATHER: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    # The grid is as large as it could need to be, for the host does not know the number of tiles.
    if expert >= experts:
        return
    row, inside, source = _rows(tile_row, offsets, gather, tile, expert, GATHER, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at = x + source[:, None] * ldx + along[None, :]
    w_at = weight + expert * w_expert + along[:, None] * w_depth + column[None, :] * w_width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, depth, BLOCK_K):
        # Zeros beyond the depth add nothing; both sides need them, for 0 times NaN is NaN.
        there = at + along < depth
        left = tl.load(x_at, mask=inside[:, None] & there[None, :], other=0.0)
        right = tl.load(w_at, mask=there[:, None] & (column < width)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * w_depth
    _finish(out, row, inside, column, width, ldo, acc, scale, ACCUMULATE)


@jit
def _planes(
    codes, absmax, value_map, nested, shift, line, lines, block, blocks, there,
    NESTED: tl.constexpr, NESTED_SHIFT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The four planes (R, 16) of block `block` of 64 columns of the given lines of the weight.

    `lines` and `blocks` are how many there are; the codes of lines that are not `there` are zero.
    """
    at = block * lines + line
    scale = block_scale(
        absmax, value_map, nested, shift, at, line * blocks + block, there, NESTED, NESTED_SHIFT,
        PTX,
    )  # fmt: skip
    codes_at = codes + at[:, None] * 16 + tl.arange(0, 16)[None, :]
    packed = tl.load(codes_at, mask=there[:, None], other=0)
    return decode_planes(packed, scale[:, None], DTYPE, PTX)


@jit
def nf4_kernel(
    x, codes, absmax, value_map, nested, offset, out, gather, offsets, tile_expert, tile_row,
    experts, width, depth, ldx, ldo, scale,
    GATHER: tl.constexpr, ACCUMULATE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert >= experts:
        return
    row, inside, source = _rows(tile_row, offsets, gather, tile, expert, GATHER, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < width
    line = expert * width + column
    lines = tl.cast(experts, tl.int64) * width
    blocks = depth // 64
    shift = tl.load(offset) if NESTED else 0.0
    # x is addressed transposed: the decoded weight is the left operand, whose elements tensor cores
    # read from registers.
    x_at = x + source[None, :] * ldx + tl.arange(0, 16)[:, None]
    x_mask = inside[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(blocks):
        w0, w1, w2, w3 = _planes(
            codes, absmax, value_map, nested, shift, line, lines, block, blocks, there, NESTED,
            NESTED_SHIFT, DTYPE, PTX,
        )  # fmt: skip
        x0 = tl.load(x_at, mask=x_mask, other=0.0)
        x1 = tl.load(x_at + 16, mask=x_mask, other=0.0)
        x2 = tl.load(x_at + 32, mask=x_mask, other=0.0)
        x3 = tl.load(x_at + 48, mask=x_mask, other=0.0)
        acc = tl.dot(w0, x0, acc, input_precision="ieee")
        acc = tl.dot(w1, x1, acc, input_precision="ieee")
        acc = tl.dot(w2, x2, acc, input_precision="ieee")
        acc = tl.dot(w3, x3, acc, input_precision="ieee")
        x_at += 64
    _finish(out, row, inside, column, width, ldo, tl.trans(acc), scale, ACCUMULATE)


@jit
def nf4_transposed_kernel(
    x, codes, absmax, value_map, nested, offset, out, gather, offsets, tile_expert, tile_row,
    experts, width, depth, ldx, ldo, scale,
    GATHER: tl.constexpr, ACCUMULATE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One block of 64 columns of the weight a program; the reduction runs over its rows."""
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert >= experts:
        return
    row, inside, source = _rows(tile_row, offsets, gather, tile, expert, GATHER, BLOCK_M)
    block = tl.program_id(1).to(tl.int64)
    blocks = width // 64
    lines = tl.cast(experts, tl.int64) * depth
    along = tl.arange(0, BLOCK_K).to(tl.int64)
    shift = tl.load(offset) if NESTED else 0.0
    x_at = x + source[:, None] * ldx + along[None, :]
    acc = tl.zeros((BLOCK_M, 64), tl.float32)
    for at in range(0, depth, BLOCK_K):
        there = at + along < depth
        line = expert * depth + at + along
        w0, w1, w2, w3 = _planes(
            codes, absmax, value_map, nested, shift, line, lines, block, blocks, there, NESTED,
            NESTED_SHIFT, DTYPE, PTX,
        )  # fmt: skip
        # Joined and permuted, column j of plane i becomes column 16 i + j of one tile.
        planes = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        right = tl.reshape(tl.permute(planes, (0, 3, 2, 1)), (BLOCK_K, 64))
        left = tl.load(x_at, mask=inside[:, None] & there[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BLOCK_K
    column = block * 64 + tl.arange(0, 64)
    _finish(out, row, inside, column, width, ldo, acc, scale, ACCUMULATE)


@jit
def outer_kernel(
    a, b, out, a_gather, b_gather, offsets, height, width, lda, ldb, ldo, scale,
    A_GATHER: tl.constexpr, B_GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(2).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.load(offsets + expert).to(tl.int64)
    last = tl.load(offsets + expert + 1).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    # One program adds up all rows of its expert: no atomics, and zero is stored where it has none.
    for at in range(first, last, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        inside = row < last
        a_row = _source(row, inside, a_gather, A_GATHER)
        b_row = _source(row, inside, b_gather, B_GATHER)
        a_mask = inside[:, None] & (p < height)[None, :]
        b_mask = inside[:, None] & (q < width)[None, :]
        left = tl.load(a + a_row[:, None] * lda + p[None, :], mask=a_mask, other=0.0)
        right = tl.load(b + b_row[:, None] * ldb + q[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    acc *= scale
    target = out + (expert * height + p)[:, None] * ldo + q[None, :]
    tl.store(
        target, acc.to(out.dtype.element_ty), mask=(p < height)[:, None] & (q < width)[None, :]
    )


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def aligned_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised, in the dtype of `like`.

    Rows begin on a multiple of 16 elements whatever the rank is, for wide loads and stores.
    """
    return like.new_empty((*shape[:-1], aligned(shape[-1])))[..., : shape[-1]]


def _in_dtype(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the dtype of `like`; a copy has aligned rows."""
    if weight.dtype == like.dtype:
        return weight
    return aligned_empty(tuple(weight.shape), like).copy_(weight)


def _width(size: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(size)))


def matmul(
    rows: Gathered,
    weight: Tensor | PlanarNF4Weight,
    offsets: Tensor,
    tiles: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    transpose: bool,
    accumulate: bool,
    scale: float,
) -> None:
    """Write, or add to, out (M, width): scale W_e x_m, or with `transpose` scale W_e^T x_m.

    `tiles` is `tile_table` of the offsets. Raises `ValueError` where `out` has no adjacent columns.
    """
    if out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}; its columns must be adjacent")
    x, gather = _adjacent(rows.matrix), rows.rows
    experts, out_features, in_features = weight.shape
    width, depth = (in_features, out_features) if transpose else (out_features, in_features)
    where = (x if gather is None else gather, offsets, *tiles, experts, width, depth)
    flags = {"GATHER": gather is not None, "ACCUMULATE": accumulate, "BLOCK_M": BLOCK_M}
    count, operations = tiles[0].shape[0], 2.0 * out.shape[0] * out_features * in_features
    with on_device(x):
        if isinstance(weight, Tensor):
            weight = _in_dtype(weight, x)
            steps = weight.stride() if transpose else (weight.stride(0), *weight.stride()[:0:-1])
            block_n = _width(width, BLOCK_N)
            launch(dense_kernel, (count, cdiv(width, block_n)), operations)(
                x, weight, out, *where, x.stride(0), out.stride(0), *steps, scale, **flags,
                BLOCK_N=block_n, BLOCK_K=_width(depth, BLOCK_K), num_warps=4, num_stages=3,
            )  # fmt: skip
            return
        quantized = {
            "NESTED": weight.nested_absmax is not None,
            "NESTED_SHIFT": nested_shift(weight),
            "DTYPE": triton_dtype(x.dtype),
            "PTX": not INTERPRETED,
        }
        planes = (x, weight.codes, weight.absmax, *nested_arguments(weight))
        given = (*planes, out, *where, x.stride(0), out.stride(0), scale)
        if transpose:
            launch(nf4_transposed_kernel, (count, width // BLOCK), operations)(
                *given, **flags, **quantized, BLOCK_K=_width(depth, BLOCK_K), num_warps=4,
                num_stages=3,
            )  # fmt: skip
        else:
            block_n = _width(width, BLOCK_N)
            launch(nf4_kernel, (count, cdiv(width, block_n)), operations)(
                *given, **flags, **quantized, BLOCK_N=block_n, num_warps=4, num_stages=3
            )


def outer(left: Gathered, right: Gathered, offsets: Tensor, scale: float) -> Tensor:
    """scale * sum of a_m b_m^T over every expert's rows, (E, P, Q) in the dtype of a = `left`."""
    a, b = _adjacent(left.matrix), _adjacent(right.matrix)
    a_rows, b_rows = left.rows, right.rows
    experts, height, width = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    out = aligned_empty((experts, height, width), a)
    block_p, block_q = _width(height, 64), _width(width, 64)
    grid = (experts, cdiv(height, block_p), cdiv(width, block_q))
    gathered = [rows.shape[0] for rows in (a_rows, b_rows) if rows is not None]
    operations = 2.0 * (gathered or [a.shape[0]])[0] * height * width
    with on_device(a):
        launch(outer_kernel, grid, operations)(
            a, b, out, a if a_rows is None else a_rows, b if b_rows is None else b_rows, offsets,
            height, width, a.stride(0), b.stride(0), out.stride(1), scale,
            A_GATHER=a_rows is not None, B_GATHER=b_rows is not None, BLOCK_M=BLOCK_K,
            BLOCK_P=block_p, BLOCK_Q=block_q, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
