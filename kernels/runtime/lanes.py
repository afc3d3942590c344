"""Loops over sixteen numbers at a time, for numba to compile.

numba's own vectoriser knows no 16-bit floats and takes seconds for a loop. Here the body of a loop
is written for whole vector registers: `lane_op` makes of it a function that numba inlines, which
compiles in tenths of a second. Numbers are fp32 between load and store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.cores import use_compiled

LANES = 16
LEAST_ELEMENTS = 1 << 17
"""Fewer than these are left to torch's ops, which need no compiling."""

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.42860676533018e-06
_EXP = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
"""exp(r) for |r| up to ln(2) / 2; the next term is less than half an ulp."""
_MOST = 87.0
_HALF = 0x7FFF

Body = Callable[["Lanes", Sequence[Any], Sequence[Any]], None]
"""Writes the instructions for addresses and fp32 scalars."""


def takes_lanes(*tensors: Tensor) -> bool:
    """Whether these are bf16 tensors of one shape on a CPU that a compiled loop is worth for.

    Their last dimension is whole vectors of adjacent elements.
    """
    first = tensors[0]
    return (
        first.dtype == torch.bfloat16
        and first.numel() >= LEAST_ELEMENTS
        and first.shape[-1] % LANES == 0
        and use_compiled(first)
        and all(x.shape == first.shape and x.stride(-1) == 1 for x in tensors)
        and all(x.dtype == first.dtype for x in tensors)
    )


def rows_of(x: Tensor) -> tuple[int, int]:
    """Address of a matrix, and bytes from row to row."""
    return x.data_ptr(), x.stride(0) * x.itemsize


def lane_op(body: Body) -> Any:
    """`(addresses, scalars)`, two tuples, as numba inlines it."""
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = [
            cgutils.unpack_tuple(builder, values, kind.count)
            for values, kind in zip(args, signature.args, strict=True)
        ]
        body(Lanes(builder), *given)
        return context.get_dummy_value()

    def op(typing_context: Any, addresses: Any, scalars: Any) -> Any:
        return types.void(addresses, scalars), generate

    return intrinsic(op)


class Lanes:
    """Instructions on vectors of sixteen numbers."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self.ir, self.builder = ir, builder
        self.byte, self.word, self.float = ir.IntType(8), ir.IntType(32), ir.FloatType()
        self.floats, self.words = self.vector(self.float), self.vector(self.word)

    def vector(self, kind: Any, count: int = LANES) -> Any:
        """The type of `count` numbers."""
        return self.ir.VectorType(kind, count)

    def constant(self, kind: Any, values: Sequence[Any]) -> Any:
        """These numbers."""
        return self.ir.Constant(self.vector(kind, len(values)), list(values))

    def integer(self, value: int) -> Any:
        """The same integer in every lane."""
        return self.constant(self.word, [value] * LANES)

    def number(self, value: float) -> Any:
        """The same number in every lane, rounded to fp32."""
        return self.constant(self.float, [float(torch.tensor(value))] * LANES)

    def same(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        nothing = self.ir.Constant(self.floats, self.ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, self.word(0))
        return self.builder.shuffle_vector(first, nothing, self.integer(0))

    def load(self, address: Any, kind: Any, count: int = LANES) -> Any:
        """`count` numbers of `kind`, at any address."""
        at = self.builder.inttoptr(address, self.vector(kind, count).as_pointer())
        return self.builder.load(at, align=1)

    def store(self, values: Any, address: Any) -> None:
        """Store numbers of any kind, at any address."""
        at = self.builder.inttoptr(address, values.type.as_pointer())
        self.builder.store(values, at, align=1)

    def bf16(self, address: Any) -> Any:
        """Load bf16 numbers as fp32."""
        b = self.builder
        narrow = b.zext(self.load(address, self.ir.IntType(16)), self.words)
        return b.bitcast(b.shl(narrow, self.integer(16)), self.floats)

    def to_bf16(self, values: Any, address: Any) -> None:
        """Store fp32 numbers as bf16."""
        b = self.builder
        upper = b.lshr(self.rounded_bits(values), self.integer(16))
        self.store(b.trunc(upper, self.vector(self.ir.IntType(16))), address)

    def rounded_bits(self, values: Any) -> Any:
        """Bits whose upper half is the bf16 next to a finite value, a tie going to the even one."""
        b = self.builder
        bits = b.bitcast(values, self.words)
        odd = b.and_(b.lshr(bits, self.integer(16)), self.integer(1))
        return b.add(b.add(bits, self.integer(_HALF)), odd)

    def rounded(self, values: Any) -> Any:
        """fp32 numbers rounded to what bf16 holds."""
        b = self.builder
        upper = b.and_(self.rounded_bits(values), self.integer(0xFFFF0000))
        return b.bitcast(upper, self.floats)

    def call(self, name: str, *values: Any) -> Any:
        """LLVM's intrinsic function `name` of vectors, which gives one of the kind of the first."""
        kind = self.ir.FunctionType(values[0].type, [value.type for value in values])
        module = self.builder.module
        known = module.globals.get(name) or self.ir.Function(module, kind, name)
        return self.builder.call(known, values)

    def add(self, left: Any, right: Any) -> Any:
        return self.builder.fadd(left, right)

    def sub(self, left: Any, right: Any) -> Any:
        return self.builder.fsub(left, right)

    def mul(self, left: Any, right: Any) -> Any:
        return self.builder.fmul(left, right)

    def fma(self, left: Any, right: Any, addend: Any) -> Any:
        """left * right + addend, rounded once."""
        return self.call("llvm.fma.v16f32", left, right, addend)

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x)), exact to some units of the last place where that is normal."""
        b, one = self.builder, self.number(1.0)
        y = self.call("llvm.minnum.v16f32", b.fneg(x), self.number(_MOST))
        y = self.call("llvm.maxnum.v16f32", y, self.number(-_MOST))
        n = self.call("llvm.floor.v16f32", self.fma(y, self.number(_LOG2E), self.number(0.5)))
        r = self.fma(n, self.number(-_LN2_HIGH), y)
        r = self.fma(n, self.number(-_LN2_LOW), r)
        p = self.number(_EXP[0])
        for coefficient in _EXP[1:]:
            p = self.fma(p, r, self.number(coefficient))
        exponent = b.add(b.fptosi(n, self.words), self.integer(127))
        power = b.bitcast(b.shl(exponent, self.integer(23)), self.floats)
        return b.fdiv(one, self.fma(p, power, one))
