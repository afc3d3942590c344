"""Dropout with a mask that is recomputed from (key, site, row, column).

The generator is Philox-4x32-10 (`kernels.runtime.random`), keyed by 64 bits that a run derives from
its seed, the step and the micro-batch. The counter names the place in the model and the element:

    words = philox(key, (j, row, site, 0)),   j = column mod S,   S = 8 ceil(width / 64)
    u = the (column div S)-th 16 bits of the words, low half before high,
    y = x / (1 - p) where u >= round(2^16 p), else 0

So one draw serves eight columns, S apart, and p is rounded to a multiple of 2^-16. Masks of
different keys, sites and elements are independent, as Philox passes every test of independence over
its counters and keys. No state is advanced, so forward, recompute and backward draw the same mask,
also in parts of the rows, and a resumed run draws the mask of the run that was interrupted. The
Triton kernel and the torch reference draw the same bits. Both read the key from the device's memory
where it lies there, so that a recorded launch (a CUDA graph) draws another mask when another key is
written. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.runtime.dispatch import use_triton
from kernels.runtime.random import philox
from kernels.runtime.simulation import equal_parts, once_per_shape
from kernels.runtime.triton_support import (
    cdiv,
    jit,
    launch,
    next_power_of_2,
    on_device,
    tl,
    triton,
)

GENERATOR = "philox4x32-10"
"""The generator's name, by which a resumed run knows whether its masks are those of its start."""

_CHUNK = 1 << 15
"""Draws of one part of the reference, whose temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class Seed:
    """Whose mask: 63 bits of `key`, a number or int64 () on the device; the `site` in the model.

    `first_row` is what the first row of a part counts as, in the whole of which it is a part, and
    `base` what the first row of that whole counts as, where it is a part of a micro-batch.
    """

    key: int | Tensor
    site: int = 0
    first_row: int = 0
    base: int = 0

    def at(self, site: int, first_row: int | None = None) -> Seed:
        """The site that lies `site` after this one, with the rows of this one by default."""
        row = self.first_row if first_row is None else first_row
        return replace(self, site=self.site + site, first_row=row)

    def scaled(self, rows: int) -> Seed:
        """The seed of something that has `rows` rows for each of the whole."""
        return replace(self, base=self.base * rows)


def _stored_key(seed: Seed, device: torch.device) -> Tensor:
    """The key in the device's memory."""
    if isinstance(seed.key, Tensor):
        return seed.key
    return torch.full((), seed.key, dtype=torch.int64, device=device)


def segment(width: int) -> int:
    """S, the columns between two that share a draw: wide stores begin at multiples of 8."""
    return 8 * cdiv(width, 64)


def threshold(p: float) -> int:
    """The least of 2^16 numbers that survives."""
    return min(65535, round(p * 65536))


def _mask_parts(
    rows: int, width: int, p: float, seed: Seed, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, mask of them and all columns) in parts; the memory of a mask is reused."""
    size = segment(width)
    step = max(1, min(rows, _CHUNK // size))
    key = _stored_key(seed, device)
    columns = torch.arange(size, device=device).unsqueeze(0)
    offsets = torch.arange(step, device=device).unsqueeze(1)
    site, zero = (torch.full((), word, dtype=torch.int64, device=device) for word in (seed.site, 0))
    memory = torch.empty(step, 8, size, dtype=torch.bool, device=device)
    least = threshold(p)
    for start in equal_parts(range(0, rows, step)):
        count = min(step, rows - start)
        row = offsets[:count] + (seed.base + seed.first_row + start)
        mask = memory[:count]
        for index, word in enumerate(philox(key, (columns, row, site, zero))):
            assert isinstance(word, Tensor)
            torch.ge(word & 0xFFFF, least, out=mask[:, 2 * index])
            torch.ge(word, least << 16, out=mask[:, 2 * index + 1])
        yield slice(start, start + count), mask.flatten(1)[:, :width]


def keep_mask(rows: int, width: int, p: float, seed: Seed, device: torch.device) -> Tensor:
    """Boolean (rows, width): True with probability 1 - p, a function of seed, row and column."""
    mask = torch.empty(rows, width, dtype=torch.bool, device=device)
    for part, keep in _mask_parts(rows, width, p, seed, device):
        mask[part] = keep
    return mask


def _as_rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows may lie apart."""
    matrix = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


@once_per_shape(
    lambda x, *_: (x.shape, x.dtype, x.is_contiguous()),
    lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
def _dropout_reference(x: Tensor, p: float, seed: Seed) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    source, target, scale = _as_rows(x), _as_rows(y), 1.0 / (1.0 - p)
    for part, keep in _mask_parts(source.shape[0], source.shape[1], p, seed, x.device):
        torch.mul(source[part], keep, out=target[part]).mul_(scale)
    return y


@jit
def _drop_segment(x, y, column, end, bits, inside, scale, threshold):
    """Columns of one segment, which ends at `end`; x and y point at its rows."""
    inside = inside & (column < end)
    values = tl.load(x + column, mask=inside, other=0.0)
    dropped = tl.where(bits >= threshold, values.to(tl.float32) * scale, 0.0)
    tl.store(y + column, dropped.to(values.dtype), mask=inside)


# One compiled kernel for every p, row and site, and for a key at any address.
@triton.jit(
    do_not_specialize=["threshold", "first_row", "site"],
    do_not_specialize_on_alignment=["key_ptr"],
)
@no_type_check
def dropout_kernel(
    x_ptr, y_ptr, key_ptr, rows, width, x_row, first_row, site, scale, threshold,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    draw = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    size = tl.cdiv(width, 64) * 8
    inside = (row < rows)[:, None] & (draw < size)
    zero = tl.zeros((ROWS, BLOCK), tl.uint32)
    counter = (row + first_row)[:, None].to(tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(
        tl.load(key_ptr), draw.to(tl.uint32) + zero, counter, zero + site.to(tl.uint32), zero
    )
    x, y = x_ptr + row[:, None] * x_row, y_ptr + row[:, None] * width
    low: tl.constexpr = 0xFFFF
    least = threshold.to(tl.uint32)
    _drop_segment(x, y, draw, width, w0 & low, inside, scale, least)
    _drop_segment(x, y, draw + size, width, w0 >> 16, inside, scale, least)
    _drop_segment(x, y, draw + 2 * size, width, w1 & low, inside, scale, least)
    _drop_segment(x, y, draw + 3 * size, width, w1 >> 16, inside, scale, least)
    _drop_segment(x, y, draw + 4 * size, width, w2 & low, inside, scale, least)
    _drop_segment(x, y, draw + 5 * size, width, w2 >> 16, inside, scale, least)
    _drop_segment(x, y, draw + 6 * size, width, w3 & low, inside, scale, least)
    _drop_segment(x, y, draw + 7 * size, width, w3 >> 16, inside, scale, least)


def tile(width: int) -> tuple[int, int, int]:
    """Rows and draws of one program (both powers of two) and its warps, for rows of `width`.

    A thread has 8 draws side by side, whose columns are one access of 16 bytes in 16 bits.
    """
    block = min(1024, next_power_of_2(segment(width)))
    return max(1, 512 // block), block, max(2, block // 256)


def _dropout_triton(x: Tensor, p: float, seed: Seed) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        source = _as_rows(x)
        count, width = source.shape
        rows, block, warps = tile(width)
        grid = (cdiv(count, rows), cdiv(segment(width), block))
        with on_device(x):
            launch(dropout_kernel, grid)(
                source, y, _stored_key(seed, x.device), count, width, source.stride(0),
                seed.base + seed.first_row, seed.site, 1.0 / (1.0 - p), threshold(p),
                ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y


def dropout(x: Tensor, p: float, seed: Seed) -> Tensor:
    """x (..., width) with each element zeroed with probability p < 1, the rest divided by 1 - p.

    Linear in x with a fixed mask: the same call with the same seed is its own backward pass. The
    rows of x may be those of a wider matrix; the result is contiguous.
    """
    if p <= 0.0:
        return x
    if p >= 1.0:
        raise ValueError(f"dropout is {p}; expected a probability below 1")
    return _dropout_triton(x, p, seed) if use_triton(x) else _dropout_reference(x, p, seed)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Seed) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return dropout(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dropout(dy, ctx.p, ctx.seed), None, None


def dropped(x: Tensor, p: float, seed: Seed) -> Tensor:
    """`dropout` for autograd, whose backward pass draws the mask again."""
    y: Tensor = _Dropped.apply(x, p, seed)
    return y
