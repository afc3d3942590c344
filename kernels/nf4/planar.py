"""The planar order of NF4 codes, which the fused matrix product reads.

bitsandbytes keeps the codes of a weight (N, K) flat and row-major, elements 2j and 2j+1 in the high
and low nibble of byte j. A product on tensor cores wants neighbouring columns in different words,
and a tile of the weight in one piece. So on a GPU a weight whose rows hold whole blocks of 64 is
stored as

    codes[b, n, j]  (int16)   nibble i  =  code of element (n, 64 b + 16 i + j),   j < 16, i < 4
    absmax[b, n]              scale of elements (n, 64 b) ... (n, 64 b + 63)

A nibble position is then a run of 16 columns, the reduction width of one tensor-core instruction,
so that the four parts of a tile go into four products without any exchange between threads; the
rows of a tile lie next to each other, and so do their scales. The bytes are as many as before
(scale blocks above 64 elements are repeated, 1/64 byte per element). Nothing is rounded: the
conversion is a permutation and `from_planar` undoes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.nf4.weight import NF4_DTYPES, NF4Tensors, NF4Weight
from kernels.runtime.simulation import equal_parts, once_per_shape

BLOCK = 64
"""Elements of a planar block."""

_WORDS = BLOCK // 4
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True, eq=False)
class PlanarNF4Weight(NF4Tensors):
    """An NF4 weight (N, K), K a multiple of 64, in the planar order.

    `codes` int16 (K/64, N, 16); `absmax` (K/64, N), uint8 with double quantisation and fp32
    without; `nested_absmax`, `nested_offset`, `shape`, `block_size` and `dtype` as in `NF4Weight`.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    def numel(self) -> int:
        return math.prod(self.shape)


AnyNF4 = NF4Weight | PlanarNF4Weight
"""An NF4 weight in either order."""


def decoded_tensor(
    shape: tuple[int, ...],
    weight: AnyNF4,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """`out` in the given shape, or a new tensor without it, to decode (part of) `weight` to.

    `dtype` defaults to that of `out`, then to the weight's. Raises ValueError where `out` does not
    fit.
    """
    if dtype is None:
        dtype = weight.dtype if out is None else out.dtype
    if dtype not in NF4_DTYPES:
        raise ValueError(f"NF4 decodes to float32, bfloat16 or float16, got {dtype}")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=weight.device)
    count = math.prod(shape)
    if out.numel() != count or out.dtype != dtype or out.device != weight.device:
        raise ValueError(
            f"out holds {out.numel()} {out.dtype} values on {out.device}, "
            f"expected {count} of {dtype} on {weight.device}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    return out.view(shape)


def has_planar_order(weight: NF4Weight) -> bool:
    """Whether `weight` can be put into the planar order: 2-D, whole blocks of 64 in each row."""
    return (
        len(weight.shape) == 2 and weight.shape[1] % BLOCK == 0 and weight.block_size % BLOCK == 0
    )


def to_planar(weight: NF4Weight) -> PlanarNF4Weight:
    """The same weight in the planar order, on the same device.

    Raises ValueError where `has_planar_order` is false.
    """
    if not has_planar_order(weight):
        raise ValueError(
            f"a weight of shape {weight.shape} in blocks of {weight.block_size} has no planar "
            f"order: it takes rows of whole blocks of {BLOCK}"
        )
    rows, columns = weight.shape
    blocks = columns // BLOCK
    codes = torch.empty(blocks, rows, _WORDS, dtype=torch.int16, device=weight.device)
    bytes_of = weight.packed.view(rows, columns // 2)
    _write_planar(bytes_of, codes)
    absmax = weight.absmax.repeat_interleave(weight.block_size // BLOCK)[: rows * blocks]
    return PlanarNF4Weight(
        codes=codes,
        absmax=absmax.view(rows, blocks).T.contiguous(),
        nested_absmax=weight.nested_absmax,
        nested_offset=weight.nested_offset,
        shape=weight.shape,
        block_size=weight.block_size,
        dtype=weight.dtype,
    )


@once_per_shape(lambda bytes_of, codes: bytes_of.shape)
def _write_planar(bytes_of: Tensor, codes: Tensor) -> None:
    """bytes uint8 (R, K/2) in bitsandbytes' order -> codes int16 (K/64, R, 16), in slabs."""
    for start in equal_parts(range(0, bytes_of.shape[0], _ROWS_AT_ONCE)):
        part = bytes_of[start : start + _ROWS_AT_ONCE]
        codes[:, start : start + part.shape[0]] = _planar_words(part).permute(1, 0, 2)


def from_planar(weight: PlanarNF4Weight) -> NF4Weight:
    """The same weight in bitsandbytes' order, on the same device."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = weight.codes[:, start : start + _ROWS_AT_ONCE].permute(1, 0, 2)
        packed[start : start + part.shape[0]] = _flat_bytes(part)
    absmax = weight.absmax.T.reshape(-1)[:: weight.block_size // BLOCK]
    return NF4Weight(
        packed=packed.view(-1),
        absmax=absmax.clone(),
        nested_absmax=weight.nested_absmax,
        nested_offset=weight.nested_offset,
        shape=weight.shape,
        block_size=weight.block_size,
        dtype=weight.dtype,
    )


def _planar_words(packed: Tensor) -> Tensor:
    """bytes uint8 (R, K/2) in bitsandbytes' order -> words int16 (R, K/64, 16)."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(packed.shape[0], -1, 4, _WORDS)
    low = codes[:, :, 0] | (codes[:, :, 1] << 4)
    high = codes[:, :, 2] | (codes[:, :, 3] << 4)
    return torch.stack((low, high), dim=-1).view(torch.int16).squeeze(-1)


def _flat_bytes(words: Tensor) -> Tensor:
    """words int16 (R, K/64, 16) -> bytes uint8 (R, K/2) in bitsandbytes' order."""
    halves = words.contiguous().view(torch.uint8).view(*words.shape, 2)
    low, high = halves[..., 0], halves[..., 1]
    codes = torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=2)
    pairs = codes.view(words.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]
