"""Decode NF4 weights with torch ops; `kernels.nf4.weight` has the maths.

The work goes in slabs: on a CPU decoding needs under 1 MB besides its result.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4.decode_compiled import COMPILED_DTYPES, decode_whole_blocks
from kernels.nf4.planar import decoded_tensor
from kernels.nf4.weight import NESTED_BLOCK, NF4_CODE, NF4Weight
from kernels.runtime.cores import use_compiled
from kernels.runtime.scratch import pool, scratch
from kernels.runtime.simulation import equal_parts, once_per_shape

# torch gives an elementwise op of more than 32,768 elements to several threads. A decode that lasts
# some hundred microseconds gains nothing from that and waits for every thread to be scheduled, so
# on a CPU it is cut into parts that stay on one core and in its cache.
_GRAIN = 1 << 15
_CPU_SLAB = 2 * _GRAIN
_CUDA_SLAB = 1 << 22
_SCALES_AT_ONCE = 1 << 15


def dequantize(
    weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Decode `weight` to a tensor of its shape.

    `dtype` is fp32, bf16 or fp16; it defaults to that of `out`, then to that of the weight that was
    quantised. `out`, if given, must be contiguous and hold as many elements as the weight; it is
    written, and returned in the weight's shape. Raises ValueError where `out` does not fit.
    """
    rows = weight.shape[0] if weight.shape else 1
    return dequantize_rows(weight, 0, rows, dtype=dtype, out=out)


def dequantize_rows(
    weight: NF4Weight,
    start: int,
    stop: int,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode rows `start:stop` of the weight's first dimension; arguments as in `dequantize`.

    Rows that do not begin on a block boundary cost one block of extra work.
    """
    rows = weight.shape[0] if weight.shape else 1
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}:{stop} lie outside a weight of {rows} rows")
    per_row = weight.numel() // rows
    shape = (stop - start, *weight.shape[1:]) if weight.shape else ()
    out = decoded_tensor(shape, weight, dtype, out)
    with torch.no_grad():
        _decode(weight, start * per_row, out.view(-1))
    return out


@functools.cache
def _pair_table(device: torch.device) -> Tensor:
    """The two fp32 values of each packed byte, as one int64 word: one lookup moves both."""
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 15]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def _decoding(weight: NF4Weight, begin: int, out: Tensor) -> tuple[object, ...]:
    """What decides how much memory decoding takes; another pool has no scratch from before."""
    skew, nested = begin % weight.block_size, weight.nested_absmax is not None
    return out.numel(), out.dtype, weight.block_size, skew, nested, id(pool())


@once_per_shape(_decoding)
def _decode(weight: NF4Weight, begin: int, out: Tensor) -> None:
    """Decode the flat elements from `begin` on into the flat `out`."""
    block_size = weight.block_size
    skew = begin % block_size
    if skew:
        head = min(block_size - skew, out.numel())
        block = torch.empty(skew + head, dtype=torch.float32, device=out.device)
        _decode_blocks(weight, begin - skew, block)
        out[:head].copy_(block[skew:])
        begin, out = begin + head, out[head:]
    if use_compiled(out) and out.dtype in COMPILED_DTYPES:
        _decode_blocks(weight, begin, out)
        return
    span = _SCALES_AT_ONCE * block_size
    for at in equal_parts(range(0, out.numel(), span)):
        _decode_blocks(weight, begin + at, out[at : at + span])


def _decode_blocks(weight: NF4Weight, begin: int, out: Tensor) -> None:
    """Decode into the flat `out` from `begin`, which lies on a block boundary."""
    block_size = weight.block_size
    if use_compiled(out) and out.dtype in COMPILED_DTYPES:
        done = out.numel() // block_size * block_size
        if done and not out.is_meta:
            decode_whole_blocks(weight, begin // block_size, out[:done])
        begin, out = begin + done, out[done:]
    if not out.numel():
        return
    scales = decode_scales(weight, begin // block_size, -(-(begin + out.numel()) // block_size))
    if out.dtype == torch.float32 and out.data_ptr() % 8 == 0:
        _look_up(weight, begin, scales, out)
        return
    slab = _GRAIN if out.is_cpu else _CUDA_SLAB
    factors = torch.split(scales, slab // block_size)
    for target, factor in equal_parts(zip(torch.split(out, slab), factors, strict=True)):
        exact = scratch("nf4 slab", (target.numel(),), torch.float32, out.device)
        _look_up(weight, begin, factor, exact)
        target.copy_(exact)
        begin += target.numel()


def _look_up(weight: NF4Weight, begin: int, scales: Tensor, out: Tensor) -> None:
    """Values times `scales`, two at a time, into `out`: fp32, aligned to 8 bytes."""
    n, block_size = out.numel(), weight.block_size
    even, whole = n - n % 2, n - n % block_size
    slab = _CPU_SLAB if out.is_cpu else _CUDA_SLAB
    rows, half = (_GRAIN if out.is_cpu else slab) // block_size, slab // 2
    table = _pair_table(weight.device)
    pairs = weight.packed[begin // 2 : (begin + n + 1) // 2]
    if even < n:
        last = table.index_select(0, pairs[-1:].to(torch.int32))
        out[even:] = last.view(torch.float32)[:1]
    blocks = torch.split(out[:whole].view(-1, block_size), rows)
    factors = torch.split(scales[: whole // block_size, None], rows)
    products = iter(zip(blocks, factors, strict=True))
    index = scratch("nf4 index", (half,), torch.int32, weight.device)
    sources = torch.split(pairs[: even // 2], half)
    targets = torch.split(out[:even].view(torch.int64), half)
    for source, target in equal_parts(zip(sources, targets, strict=True)):
        chosen = index[: len(source)].copy_(source)
        torch.index_select(table, 0, chosen, out=target)
        for block, factor in itertools.islice(products, slab // (rows * block_size)):
            block.mul_(factor)
    if whole < n:
        out[whole:].mul_(scales[-1])


def decode_scales(weight: NF4Weight, first: int, last: int) -> Tensor:
    """fp32 scales (last - first,) of the blocks `first:last`."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax[first:last]
    aligned = first - first % NESTED_BLOCK
    codes = weight.absmax[aligned:last].to(torch.int32)
    scales = dynamic_map(True, weight.device).index_select(0, codes)
    nested = weight.nested_absmax[aligned // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
    whole = scales.numel() - scales.numel() % NESTED_BLOCK
    scales[:whole].view(-1, NESTED_BLOCK).mul_(nested[: whole // NESTED_BLOCK, None])
    if whole < scales.numel():
        scales[whole:].mul_(nested[-1])
    return scales.add_(weight.nested_offset)[first - aligned :]
