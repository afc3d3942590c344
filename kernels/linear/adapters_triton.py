"""Triton kernels that join a group's adapters and separate their gradients.

A program moves one tile of one adapter: 16 of its rank's columns, which is what an adapter's
columns are padded to, and some rows of B or columns of A. Which adapter a tile belongs to follows
from its column block, so up to three adapters, and the zeros around them, take one launch.
`kernels.linear.adapters` has the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels.linear.projection import ALIGNED, GroupLayout
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl

ROWS, WIDTH, WARPS = 64, 64, 4
"""Rows of B, and columns of A, in a tile, and its warps."""
_AT_ONCE = 3
_NONE = 1 << 30

Pair = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and their scale."""


@jit
def _own(block, second, third, x0, x1, x2):
    """That of three values which belongs to the adapter of a column block."""
    return tl.where(block < second, x0, tl.where(block < third, x1, x2))


@jit
def _pack_b(source, target, scale, own, column, row, first, height, rank, inside, line):
    # Rows of other projections get zeros: the joint matrix is block diagonal.
    mine = (row >= first)[:, None] & (row < first + height)[:, None] & (own < rank)
    at = source + (row - first)[:, None] * rank + own
    value = tl.load(at, mask=mine & inside, other=0.0).to(tl.float32) * scale
    tl.store(target + row[:, None] * line + column, value, mask=inside)


@jit
def _pack_a(source, target, own, low, x, rank, columns, line):
    inside = x < columns
    at = source + own[:, None] * columns + x
    value = tl.load(at, mask=inside & (own < rank)[:, None], other=0.0)
    tl.store(target + low[:, None] * line + x, value.to(target.dtype.element_ty), mask=inside)


@jit
def pack_kernel(
    a0, a1, a2, b0, b1, b2, a_ptr, b_ptr, scale0, scale1, scale2, rank0, rank1, rank2,
    first0, first1, first2, height0, height1, height2, second, third, rows, columns, a_row, b_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    low = block * BLOCK + tl.arange(0, BLOCK)
    rank = _own(block, second, third, rank0, rank1, rank2)
    # Columns counted from the adapter's own first one.
    own = (block - _own(block, second, third, 0, second, third)) * BLOCK + tl.arange(0, BLOCK)
    b_tiles = tl.cdiv(rows, ROWS)
    if tile < b_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (low >= 0)[None, :]
        first = _own(block, second, third, first0, first1, first2)
        height = _own(block, second, third, height0, height1, height2)
        scale = _own(block, second, third, scale0, scale1, scale2)
        mine, column = own[None, :], low[None, :]
        if block < second:
            _pack_b(b0, b_ptr, scale, mine, column, row, first, height, rank, inside, b_row)
        elif block < third:
            _pack_b(b1, b_ptr, scale, mine, column, row, first, height, rank, inside, b_row)
        else:
            _pack_b(b2, b_ptr, scale, mine, column, row, first, height, rank, inside, b_row)
    else:
        x = ((tile - b_tiles) * WIDTH + tl.arange(0, WIDTH))[None, :]
        if block < second:
            _pack_a(a0, a_ptr, own, low, x, rank, columns, a_row)
        elif block < third:
            _pack_a(a1, a_ptr, own, low, x, rank, columns, a_row)
        else:
            _pack_a(a2, a_ptr, own, low, x, rank, columns, a_row)


@jit
def _unpack_b(target, source, scale, own, column, row, first, height, rank, line):
    # Blocks off the diagonal are products of one projection's dz with another's x A^T: no gradient.
    mine = (row >= first)[:, None] & (row < first + height)[:, None] & (own < rank)
    value = tl.load(source + row[:, None] * line + column, mask=mine, other=0.0).to(tl.float32)
    at = target + (row - first)[:, None] * rank + own
    tl.store(at, (value * scale).to(target.dtype.element_ty), mask=mine)


@jit
def _unpack_a(target, source, own, low, x, rank, columns, line):
    inside = (x < columns) & (own < rank)[:, None]
    value = tl.load(source + low[:, None] * line + x, mask=inside, other=0.0)
    at = target + own[:, None] * columns + x
    tl.store(at, value.to(target.dtype.element_ty), mask=inside)


@jit
def unpack_kernel(
    a0, a1, a2, b0, b1, b2, a_ptr, b_ptr, scale0, scale1, scale2, rank0, rank1, rank2,
    first0, first1, first2, height0, height1, height2, second, third, rows, columns, a_row, b_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    low = block * BLOCK + tl.arange(0, BLOCK)
    rank = _own(block, second, third, rank0, rank1, rank2)
    own = (block - _own(block, second, third, 0, second, third)) * BLOCK + tl.arange(0, BLOCK)
    b_tiles = tl.cdiv(rows, ROWS)
    if tile < b_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        first = _own(block, second, third, first0, first1, first2)
        height = _own(block, second, third, height0, height1, height2)
        scale = _own(block, second, third, scale0, scale1, scale2)
        mine, column = own[None, :], low[None, :]
        if block < second:
            _unpack_b(b0, b_ptr, scale, mine, column, row, first, height, rank, b_row)
        elif block < third:
            _unpack_b(b1, b_ptr, scale, mine, column, row, first, height, rank, b_row)
        else:
            _unpack_b(b2, b_ptr, scale, mine, column, row, first, height, rank, b_row)
    else:
        x = ((tile - b_tiles) * WIDTH + tl.arange(0, WIDTH))[None, :]
        if block < second:
            _unpack_a(a0, a_ptr, own, low, x, rank, columns, a_row)
        elif block < third:
            _unpack_a(a1, a_ptr, own, low, x, rank, columns, a_row)
        else:
            _unpack_a(a2, a_ptr, own, low, x, rank, columns, a_row)


@dataclass(frozen=True)
class _Launch:
    """One launch: its three adapters, the first of its columns, its grid, and its numbers."""

    adapters: tuple[int, ...]
    low: int
    grid: tuple[int, int]
    numbers: tuple[int, ...]


@lru_cache(maxsize=256)
def _launches(layout: GroupLayout, columns: int) -> tuple[_Launch, ...]:
    """The launches that go over all column blocks, for pairs with so many inputs."""
    adapters = list(layout.blocks())
    tiles = cdiv(layout.rows, ROWS) + cdiv(columns, WIDTH)
    launches = []
    for at in range(0, len(adapters), _AT_ONCE):
        some = adapters[at : at + _AT_ONCE]
        starts = [part.start // ALIGNED for _, _, part in some]
        blocks = cdiv(some[-1][2].stop, ALIGNED) - starts[0]
        bounds = [*(start - starts[0] for start in starts[1:]), _NONE, _NONE]
        # Adapters that are not there stand for the first one; no column block is theirs.
        indices = (*range(at, at + len(some)), *[at] * (_AT_ONCE - len(some)))
        some = [adapters[index] for index in indices]
        ranks = (part.stop - part.start for _, _, part in some)
        first = (rows.start for _, rows, _ in some)
        heights = (rows.stop - rows.start for _, rows, _ in some)
        numbers = (*ranks, *first, *heights, *bounds[:2], layout.rows, columns)
        launches.append(_Launch(indices, starts[0] * ALIGNED, (tiles, blocks), numbers))
    return tuple(launches)


def _launch(
    kernel: object, pairs: Sequence[Pair], layout: GroupLayout, a: Tensor, b: Tensor
) -> None:
    """Launch over the column blocks of up to three adapters at a time."""
    for one in _launches(layout, a.shape[1]):
        p0, p1, p2 = (pairs[index] for index in one.adapters)
        a_part, b_part = (a[one.low :], b[:, one.low :]) if one.low else (a, b)
        with on_device(a):
            launch(kernel, one.grid)(
                p0[0], p1[0], p2[0], p0[1], p1[1], p2[1], a_part, b_part, p0[2], p1[2], p2[2],
                *one.numbers, a.stride(0), b.stride(0),
                ROWS=ROWS, WIDTH=WIDTH, BLOCK=ALIGNED, num_warps=WARPS,
            )  # fmt: skip


def pack_triton(pairs: Sequence[Pair], layout: GroupLayout, a: Tensor, b: Tensor) -> None:
    """Write a (spare, in) and b (sum out, spare) of contiguous pairs."""
    _launch(pack_kernel, [(x.contiguous(), y.contiguous(), s) for x, y, s in pairs], layout, a, b)


def unpack_triton(
    da: Tensor, db: Tensor, pairs: Sequence[Pair], layout: GroupLayout
) -> list[tuple[Tensor, Tensor]]:
    """dA_i and dB_i in the dtypes of the pairs, out of da (spare, in) and db (sum out, spare)."""
    made = [(torch.empty_like(a), torch.empty_like(b), scale) for a, b, scale in pairs]
    _launch(unpack_kernel, made, layout, da, db)
    return [(a, b) for a, b, _ in made]
