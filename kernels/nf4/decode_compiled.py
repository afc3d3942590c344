"""Decode NF4 on a CPU with a loop that numba compiles.

`kernels.nf4.weight` has the maths. Sixteen bytes of codes are 32 elements. A vector register holds
the whole table of sixteen values, so a lookup is one permute of it under AVX-512, and a tree of
four selects elsewhere. Values are multiplied by the block's scale in fp32 and rounded once: the
bits are those of `kernels.nf4.decode`, which needs about five times as long. numba's vectoriser
knows no permutes, so the body of the loop is written in LLVM's instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import arrays
from kernels.nf4.weight import NESTED_BLOCK, NF4_CODE, NF4Weight
from kernels.runtime.cores import over_cores
from kernels.runtime.lanes import LANES, Body, Lanes, lane_op

COMPILED_DTYPES = (torch.float32, torch.bfloat16)

_LEAST_ELEMENTS = 1 << 20


def decode_whole_blocks(weight: NF4Weight, first: int, out: Tensor) -> None:
    """Write the elements of whole blocks, from block `first` on, to the flat `out`.

    The weight lies on the CPU, and `out`, contiguous, is one of `COMPILED_DTYPES`.
    """
    size, count = weight.block_size, out.numel() // weight.block_size
    half, step = size // 2, size * out.itemsize
    source, target = weight.packed.data_ptr() + first * half, out.data_ptr()
    nested, offset = weight.nested_absmax, weight.nested_offset
    double = nested is not None and offset is not None
    loop = compiled_loop(out.dtype == torch.bfloat16, wide_permutes(), double)
    stored = weight.absmax[first : first + count].numpy()
    scales: tuple[Any, ...] = ()
    if nested is not None and offset is not None:
        scales = arrays(True)[0], nested.numpy(), np.float32(offset)

    def part(begin: int, end: int) -> None:
        rest = (*scales, first + begin) if double else ()
        loop(source + begin * half, target + begin * step, stored[begin:end], half, *rest)

    over_cores(count, max(1, _LEAST_ELEMENTS // size), part)


@functools.cache
def wide_permutes() -> bool:
    """Whether this processor permutes sixteen floats with one instruction."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512f", False))


@functools.cache
def compiled_loop(narrow: bool, permutes: bool, double: bool = False) -> Any:
    """The loop `(codes, target, scales, bytes of a block)` over blocks; both ends are addresses.

    `narrow` writes bf16 instead of fp32, and `permutes` takes AVX-512's permute. With `double`
    scales are codes themselves, and their table, their own scales, their offset and the number of
    the first block follow. It runs without Python's lock. Compiling takes some tenths of a second.
    """
    from numba import njit

    decode = lane_op(_body(narrow, permutes))
    size = 2 * LANES * (2 if narrow else 4)
    compiled = njit(nogil=True)

    @compiled
    def decode_block(codes, target, scale, begin, end):  # type: ignore[no-untyped-def]
        for at in range(begin, end, 16):
            decode((codes + at, target + at // 16 * size), (scale,))

    def loop(codes, target, scales, half):  # type: ignore[no-untyped-def]
        for block in range(scales.size):
            decode_block(codes, target, scales[block], block * half, (block + 1) * half)

    def double_loop(  # type: ignore[no-untyped-def]
        codes, target, scales, half, table, nested, offset, first
    ):
        for block in range(scales.size):
            scale = table[scales[block]] * nested[(first + block) // NESTED_BLOCK] + offset
            decode_block(codes, target, scale, block * half, (block + 1) * half)

    return compiled(double_loop if double else loop)


def _body(narrow: bool, permutes: bool) -> Body:
    """`(address of 16 bytes, address of 32 elements), (scale)`: load, look up, multiply, store."""

    def write(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        b, (codes, target) = lanes.builder, addresses
        indices = b.zext(lanes.load(codes, lanes.byte), lanes.words)
        factor = lanes.same(scalars[0])
        # The even element has the high nibble.
        high, low = b.lshr(indices, lanes.integer(4)), b.and_(indices, lanes.integer(15))
        even = lanes.mul(look_up(lanes, high, permutes), factor)
        odd = lanes.mul(look_up(lanes, low, permutes), factor)
        if narrow:
            first = b.lshr(lanes.rounded_bits(even), lanes.integer(16))
            second = b.and_(lanes.rounded_bits(odd), lanes.integer(0xFFFF0000))
            lanes.store(b.or_(first, second), target)
            return
        order = [lane for i in range(LANES) for lane in (i, LANES + i)]
        lanes.store(b.shuffle_vector(even, odd, lanes.constant(lanes.word, order)), target)

    return write


def look_up(lanes: Lanes, indices: Any, permutes: bool) -> Any:
    """The values of NF4 codes, one a word."""
    b, codes = lanes.builder, NF4_CODE.tolist()
    if permutes:
        table = lanes.constant(lanes.float, codes)
        return lanes.call("llvm.x86.avx512.permvar.sf.512", table, indices)
    level = [lanes.number(code) for code in codes]
    for bit in range(4):
        masked = b.and_(indices, lanes.integer(1 << bit))
        chosen = b.icmp_unsigned("!=", masked, lanes.integer(0))
        pairs = zip(level[1::2], level[::2], strict=True)
        level = [b.select(chosen, one, zero) for one, zero in pairs]
    return level[0]
