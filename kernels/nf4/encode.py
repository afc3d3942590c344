"""Quantise weights to NF4; `kernels.nf4.weight` has the maths.

On a CPU the work goes in slabs: besides its result `quantize` needs about 3 MB.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import quantize_blocks
from kernels.nf4.quantize_triton import quantize_whole_blocks
from kernels.nf4.weight import BLOCK_SIZES, NESTED_BLOCK, NF4_CODE, NF4_DTYPES, NF4Weight
from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import equal_parts, once_per_shape

_SMALLEST_SCALE = 1e-38
_CELLS = 32
_QUANTIZE_SLAB = 1 << 17


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise `w` (any shape, fp32, bf16 or fp16, any device) to NF4.

    Raises ValueError for an empty tensor, another dtype, a block size outside `BLOCK_SIZES`, and
    for a weight with NaN or infinity, whose scales would spoil their neighbours through the mean.
    """
    if w.dtype not in NF4_DTYPES:
        raise ValueError(f"NF4 holds float32, bfloat16 or float16 weights, got {w.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if w.numel() == 0:
        raise ValueError(f"cannot quantise an empty tensor of shape {tuple(w.shape)}")
    packed, absmax = _quantize_flat(w.detach().reshape(-1), block_size)
    weight = NF4Weight(packed, absmax, None, None, tuple(w.shape), block_size, w.dtype)
    if not double_quant:
        return weight
    offset = absmax.mean()
    codes, nested_absmax = _quantize_scales(absmax.sub_(offset))
    return replace(weight, absmax=codes, nested_absmax=nested_absmax, nested_offset=offset)


def _quantize_flat(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (packed) and fp32 scales of a flat tensor."""
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    if use_triton(flat):
        quantize_whole_blocks(flat, _thresholds(flat.device), block_size, packed, absmax)
        _refuse_nonfinite(absmax[: n // block_size])
    else:
        _quantize_whole_blocks(flat, block_size, packed, absmax)
    whole = n - n % block_size
    if whole < n:
        # bitsandbytes multiplies a whole block by its inverse scale but divides a short last one.
        rest = flat[whole:].float()
        scale = rest.abs().amax()
        _refuse_nonfinite(scale)
        absmax[-1] = scale.clamp_(min=_SMALLEST_SCALE)
        padded = torch.nn.functional.pad(rest / scale, (0, rest.numel() % 2))
        _pack(_nearest_code(padded), packed[whole // 2 :])
    return packed, absmax


@once_per_shape(lambda flat, block_size, *_: (flat.numel(), flat.dtype, block_size))
def _quantize_whole_blocks(flat: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Write codes and scales of all but a short last block, a slab at a time."""
    whole = flat.numel() - flat.numel() % block_size
    for begin in equal_parts(range(0, whole, _QUANTIZE_SLAB)):
        end = min(begin + _QUANTIZE_SLAB, whole)
        blocks = flat[begin:end].view(-1, block_size)
        blocks = blocks.float() if flat.dtype != torch.float32 else blocks
        scales = blocks.abs().amax(dim=1)
        _refuse_nonfinite(scales)
        absmax[begin // block_size : end // block_size] = scales
        inverse = scales.clamp_(min=_SMALLEST_SCALE).reciprocal_()
        _pack(_nearest_code((blocks * inverse[:, None]).view(-1)), packed[begin // 2 : end // 2])


def _refuse_nonfinite(scales: Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("cannot quantise a weight that holds NaN or infinity")


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    """The 15 midpoints between neighbouring values, fp32."""
    return ((NF4_CODE[1:] + NF4_CODE[:-1]) / 2).to(device)


@functools.cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of 32 even cells over [-1, 1]: the code at its left edge and the next threshold.

    NF4's thresholds lie more than a cell apart and none lies on an edge, so a cell holds at most
    one and a single comparison completes the search.
    """
    thresholds = _thresholds(torch.device("cpu"))
    edges = torch.arange(_CELLS + 1, dtype=torch.float32, device="cpu") * (2.0 / _CELLS) - 1.0
    code = torch.bucketize(edges, thresholds, out_int32=True)
    beyond = torch.tensor([2.0], dtype=torch.float32, device="cpu")
    return code.to(device), torch.cat([thresholds, beyond])[code.long()].to(device)


def _nearest_code(scaled: Tensor) -> Tensor:
    """Index (int32) of the NF4 value nearest to `scaled`, fp32 (n,) in [-1, 1]; ties go down."""
    left, threshold = _cells(scaled.device)
    cell = ((scaled + 1.0) * (_CELLS / 2)).to(torch.int32)
    return left.index_select(0, cell).add_(scaled > threshold.index_select(0, cell))


def _pack(codes: Tensor, out: Tensor) -> None:
    pairs = codes.to(torch.uint8).view(-1, 2)
    torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=out)


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise centred fp32 scales (n,): codes uint8 (n,) and absmax fp32 (ceil(n / 256),)."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    codes, absmax = quantize_blocks(blocks, signed=True, rounding="grid")
    return codes.view(-1)[:n].clone(), absmax
