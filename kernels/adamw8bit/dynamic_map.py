"""The 8-bit dynamic data type, and block-wise quantisation to it.

Maths. The map of Dettmers et al. ("8-bit Optimizers via Block-wise Quantization", 2022) has seven
decades, 10^-6 to 10^0. Decade i holds 2^i values per sign (signed) or 2^(i+1) values (unsigned):
the midpoints of an even division of [0.1, 1], times 10^(i-6). 0 and 1 complete the 256 entries. A
block of values x is stored as `absmax = max|x|` (fp32) and one code per value, the index of the
map's entry for `x * (1 / absmax)`.

Two roundings to the map are in use, and both are needed to agree with bitsandbytes:

* `grid` is what bitsandbytes does on a CPU. `x / absmax` is first rounded to one of 65,536 even
  steps over [-1, 1]; a table gives that step's nearest code. An exact zero falls half a step above
  zero, so a small second moment is never stored as 0.
* `nearest` is what bitsandbytes does on CUDA: the nearest entry, a tie going to the lower one.

A block of zeros has absmax 0 and decodes to zeros.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Rounding = Literal["grid", "nearest"]

GRID_STEPS = 65536
"""Entries of the `grid` table."""

_DECADES = 7
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@functools.cache
def _host_map(signed: bool) -> Tensor:
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (decade - (_DECADES - 1))
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@functools.cache
def _host_midpoints(signed: bool) -> Tensor:
    code = _host_map(signed)
    return (code[:-1] + code[1:]) / 2


@functools.cache
def _host_grid(signed: bool) -> Tensor:
    code = _host_map(signed).double()
    steps = torch.arange(GRID_STEPS, dtype=torch.float32, device="cpu")
    values = steps * 2.0 / (GRID_STEPS - 1) - 1.0
    return torch.bucketize(values.double(), (code[:-1] + code[1:]) / 2).to(torch.uint8)


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the map, ascending, fp32, on `device`. Callers must not write to it."""
    return _host_map(signed).to(device)


@functools.cache
def midpoints(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 255 thresholds of the `nearest` rounding, fp32: a code counts how many lie below x."""
    return _host_midpoints(signed).to(device)


@functools.cache
def grid_table(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 65,536 codes (uint8) of the `grid` rounding: entry i stands for `-1 + 2 i / 65535`."""
    return _host_grid(signed).to(device)


@functools.cache
def arrays(signed: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`dynamic_map` and `grid_table` for compiled loops, without a view of them in every step."""
    return dynamic_map(signed).numpy(), grid_table(signed).numpy()


FIRST_CELL = 0x3400
"""High half of the bits of 2^-23, below which every magnitude has code 0."""


@functools.cache
def magnitude_tables(signed: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A `nearest` rounding of magnitudes by two lookups: codes of cells (uint8), thresholds (fp32).

    The high half of a positive float's bits, less `FIRST_CELL`, numbers a cell so narrow that it
    holds one threshold at most: `code = cells[number]`, plus 1 if the value is above
    `thresholds[code]`.
    The signed map is its positive half here, so its codes count from 0 at zero to 128 at one.
    """
    code = _host_map(signed)[127:] if signed else _host_map(signed)
    middles = (code[:-1] + code[1:]) / 2
    numbers = torch.arange(FIRST_CELL, 0x3F80 + 1, dtype=torch.int32, device="cpu")
    edges = (numbers << 16).view(torch.float32)
    cells = torch.bucketize(edges, middles).to(torch.uint8)
    endless = torch.full((1,), float("inf"), dtype=torch.float32, device="cpu")
    return cells.to(device), torch.cat([middles, endless]).to(device)


def quantize_blocks(
    values: Tensor, *, signed: bool, rounding: Rounding = "grid", scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise rows of `values` (blocks, block_size) fp32, each row with its own scale.

    Returns codes, uint8 of the shape of `values`, and absmax, fp32 (blocks,). `scratch`, if given,
    is an fp32 tensor of the shape of `values` to overwrite; it may be `values` itself.
    """
    absmax = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_()).abs_()
    # A subnormal absmax has no finite reciprocal: such a block is stored too small, never as NaN.
    inverse = absmax.clamp(min=_SMALLEST_NORMAL).reciprocal_()
    scaled = torch.mul(values, inverse[:, None], out=scratch)
    if rounding == "nearest":
        nearest = torch.bucketize(scaled, midpoints(signed, values.device), out_int32=True)
        return nearest.to(torch.uint8), absmax
    if rounding != "grid":
        raise ValueError(f"rounding must be 'grid' or 'nearest', got {rounding!r}")
    # The shift to [0, 2] is left out for a block of zeros, which so takes code 0.
    shift = (absmax != 0).to(torch.float32)
    steps = scaled.add_(shift[:, None]).mul_((GRID_STEPS - 1) / 2).add_(0.5).to(torch.int32)
    codes = grid_table(signed, values.device).index_select(0, steps.view(-1))
    return codes.view(values.shape), absmax


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, *, signed: bool, out: Tensor | None = None
) -> Tensor:
    """Decode rows of `codes` (blocks, block_size) uint8 with `absmax` (blocks,) to fp32."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    table = dynamic_map(signed, codes.device)
    torch.index_select(table, 0, codes.reshape(-1).to(torch.int32), out=out.view(-1))
    return out.mul_(absmax[:, None])
