"""Decode NF4 on a CPU with a loop that numba compiles.

`kernels.nf4.weight` has the maths. Sixteen bytes of codes are 32 elements. A vector register holds
the whole table of sixteen values, so a lookup is one permute of it under AVX-512, and a tree of
four selects elsewhere. Values are multiplied by the block's scale in fp32 and rounded once: the
bits are those of `kernels.nf4.decode`, which needs about five times as long. numba's vectoriser
knows no permutes, so the body of the loop is written in LLVM's instructions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels.nf4.weight import NF4_CODE
from kernels.runtime.cores import over_cores

COMPILED_DTYPES = (torch.float32, torch.bfloat16)

_LANES = 16
_LEAST_ELEMENTS = 1 << 20


def decode_whole_blocks(packed: Tensor, scales: Tensor, block_size: int, out: Tensor) -> None:
    """Write the elements of whole blocks to the flat `out` (blocks * block_size,).

    `packed` uint8 holds their codes, `scales` fp32 (blocks,) their scales; all lie on the CPU and
    are contiguous, and `out` is one of `COMPILED_DTYPES`.
    """
    loop = compiled_loop(out.dtype == torch.bfloat16, wide_permutes())
    source, target = packed.data_ptr(), out.data_ptr()
    factors, half, size = scales.numpy(), block_size // 2, block_size * out.itemsize

    def part(begin: int, end: int) -> None:
        loop(source + begin * half, target + begin * size, factors[begin:end], half)

    over_cores(len(factors), max(1, _LEAST_ELEMENTS // block_size), part)


@functools.cache
def wide_permutes() -> bool:
    """Whether this processor permutes sixteen floats with one instruction."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512f", False))


@functools.cache
def compiled_loop(narrow: bool, permutes: bool) -> Any:
    """The loop `(codes, target, scales, bytes of a block)` over blocks; both ends are addresses.

    `narrow` writes bf16 instead of fp32, and `permutes` takes AVX-512's permute. It runs without
    Python's lock. Compiling takes a few tenths of a second.
    """
    from numba import njit

    decode = _intrinsic(narrow, permutes)
    size = 2 * _LANES * (2 if narrow else 4)

    def loop(codes, target, scales, half):  # type: ignore[no-untyped-def]
        for block in range(scales.size):
            scale = scales[block]
            for at in range(block * half, (block + 1) * half, 16):
                decode(codes + at, target + at // 16 * size, scale)

    return njit(nogil=True)(loop)


def _intrinsic(narrow: bool, permutes: bool) -> Any:
    """`(address of 16 bytes, address of 32 elements, scale)`, as numba inlines it."""
    from numba import types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, target, scale = args
        _Body(builder, permutes).write(codes, target, scale, narrow)
        return context.get_dummy_value()

    def decode(typing_context: Any, codes: Any, target: Any, scale: Any) -> Any:
        return types.void(types.intp, types.intp, types.float32), generate

    return intrinsic(decode)


class _Body:
    """LLVM instructions that decode 16 bytes."""

    def __init__(self, builder: Any, permutes: bool) -> None:
        from llvmlite import ir

        self.ir, self.builder, self.permutes = ir, builder, permutes
        self.byte, self.word, self.float = ir.IntType(8), ir.IntType(32), ir.FloatType()

    def write(self, codes: Any, target: Any, scale: Any, narrow: bool) -> None:
        """Load, look up, multiply and store."""
        b, ir = self.builder, self.ir
        source = b.inttoptr(codes, self._vector(self.byte).as_pointer())
        indices = b.zext(b.load(source, align=1), self._vector(self.word))
        nothing = ir.Constant(self._vector(self.float), ir.Undefined)
        first = b.insert_element(nothing, scale, self.word(0))
        factor = b.shuffle_vector(first, nothing, self._all(0))
        # The even element has the high nibble.
        even = b.fmul(self._look_up(b.lshr(indices, self._all(4))), factor)
        odd = b.fmul(self._look_up(b.and_(indices, self._all(15))), factor)
        if narrow:
            low = b.lshr(self._rounded(even), self._all(16))
            pairs = b.or_(low, b.and_(self._rounded(odd), self._all(0xFFFF0000)))
            address = b.inttoptr(target, self._vector(self.word).as_pointer())
            b.store(pairs, address, align=2)
            return
        order = [lane for i in range(_LANES) for lane in (i, _LANES + i)]
        woven = b.shuffle_vector(even, odd, self._constant(self.word, order))
        address = b.inttoptr(target, ir.VectorType(self.float, 2 * _LANES).as_pointer())
        b.store(woven, address, align=4)

    def _look_up(self, indices: Any) -> Any:
        b, codes, floats = self.builder, NF4_CODE.tolist(), self._vector(self.float)
        if self.permutes:
            name = "llvm.x86.avx512.permvar.sf.512"
            kind = self.ir.FunctionType(floats, [floats, self._vector(self.word)])
            permute = b.module.globals.get(name) or self.ir.Function(b.module, kind, name)
            return b.call(permute, [self._constant(self.float, codes), indices])
        level = [self._constant(self.float, [code] * _LANES) for code in codes]
        for bit in range(4):
            masked = b.and_(indices, self._all(1 << bit))
            chosen = b.icmp_unsigned("!=", masked, self._all(0))
            pairs = zip(level[1::2], level[::2], strict=True)
            level = [b.select(chosen, one, zero) for one, zero in pairs]
        return level[0]

    def _rounded(self, values: Any) -> Any:
        """Bits whose upper half is the bf16 next to a finite value, a tie going to the even one."""
        b = self.builder
        bits = b.bitcast(values, self._vector(self.word))
        odd = b.and_(b.lshr(bits, self._all(16)), self._all(1))
        return b.add(b.add(bits, self._all(0x7FFF)), odd)

    def _vector(self, kind: Any) -> Any:
        return self.ir.VectorType(kind, _LANES)

    def _constant(self, kind: Any, values: list[Any]) -> Any:
        return self.ir.Constant(self.ir.VectorType(kind, len(values)), values)

    def _all(self, value: int) -> Any:
        return self._constant(self.word, [value] * _LANES)
