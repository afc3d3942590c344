"""8-bit rows with one fp32 scale per output row.

    w[i, j] = codes[i, j] * absmax[i] / 127

A GPU decodes in one launch, 3 bytes of traffic for an element in 16 bits. The same layout as
bitsandbytes' LLM.int8 weights (`weight` and `SCB`), without its outlier split.
Source: Dettmers et al. 2022, arXiv 2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import equal_parts, stays_on_host
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

_SLAB_ROWS = 1024


@dataclass(frozen=True)
class Int8Weight:
    """codes (out, in) int8 and absmax (out,) fp32; `dtype` is what it decodes to by default."""

    codes: Tensor
    absmax: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def numel(self) -> int:
        return self.codes.numel()

    def to(self, device: torch.device | str) -> Int8Weight:
        """A copy on `device`, or this one if it is there already."""
        return Int8Weight(self.codes.to(device), self.absmax.to(device), self.dtype)


def quantize_int8(weight: Tensor, device: torch.device | None = None) -> Int8Weight:
    """Round a matrix (out, in) to 8-bit rows, nearest even, in slabs of rows.

    With a `device` the codes are made there, and the matrix is sent to it a slab at a time. Raises
    `ValueError` for anything but a floating-point matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"expected a floating-point matrix, got {tuple(weight.shape)} {weight.dtype}"
        )
    if device is None:
        device = weight.device
    else:
        stays_on_host(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
    for start in equal_parts(range(0, weight.shape[0], _SLAB_ROWS)):
        rows = slice(start, start + _SLAB_ROWS)
        part = weight[rows].to(device).float()
        absmax[rows] = part.abs().amax(1)
        inverse = torch.where(absmax[rows] > 0, 127.0 / absmax[rows], 0.0)
        codes[rows] = (part * inverse.unsqueeze(1)).round_().to(torch.int8)
    return Int8Weight(codes, absmax, weight.dtype)


def _dequantize_reference(weight: Int8Weight, target: Tensor) -> None:
    for start in equal_parts(range(0, weight.shape[0], _SLAB_ROWS)):
        rows = slice(start, start + _SLAB_ROWS)
        scale = (weight.absmax[rows] / 127.0).unsqueeze(1)
        target[rows] = weight.codes[rows].float().mul_(scale)


@jit
def dequantize_int8_kernel(
    codes_ptr, absmax_ptr, out_ptr, rows, width, codes_row, out_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    # Rounded as the reference's quotient is; Triton's plain division is not.
    scale = tl.div_rn(tl.load(absmax_ptr + row, mask=row < rows, other=0.0), 127.0)
    codes = tl.load(codes_ptr + row[:, None] * codes_row + column, mask=inside, other=0)
    values = codes.to(tl.float32) * scale[:, None]
    target = out_ptr + row[:, None] * out_row + column
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)


def tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of one program (powers of two) and its warps: 32 elements a thread."""
    block = min(2048, next_power_of_2(width))
    return max(1, 4096 // block), block, 4


def _dequantize_triton(weight: Int8Weight, target: Tensor) -> None:
    codes = weight.codes if weight.codes.stride(1) == 1 else weight.codes.contiguous()
    count, width = codes.shape
    rows, block, warps = tile(width)
    if codes.numel():
        with on_device(target):
            launch(dequantize_int8_kernel, (cdiv(count, rows), cdiv(width, block)))(
                codes, weight.absmax.contiguous(), target, count, width, codes.stride(0),
                target.stride(0), ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip


def dequantize_int8(
    weight: Int8Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense matrix (out, in) in `dtype`, or in `out`: one rounding from fp32.

    The rows of `out` may be those of a wider matrix. Raises `ValueError` where it does not fit.
    """
    target = out
    if target is None:
        target = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    if target.shape != weight.shape or (target.stride(1) != 1 and target.shape[1] > 1):
        raise ValueError(
            f"out is {tuple(target.shape)} with strides {target.stride()}; expected "
            f"{weight.shape} with the elements of a row adjacent"
        )
    if use_triton(target):
        _dequantize_triton(weight, target)
    else:
        _dequantize_reference(weight, target)
    return target


def rows_int8(weight: Int8Weight, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `index` (N,) of the dense matrix, (N, in), as `dequantize_int8` rounds them."""
    scale = (weight.absmax.index_select(0, index) / 127.0).unsqueeze(1)
    wide = weight.codes.index_select(0, index).float().mul_(scale)
    return wide.to(dtype or weight.dtype)
