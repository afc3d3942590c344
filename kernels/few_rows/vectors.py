"""Instructions for few rows beside those of `kernels.runtime.lanes`."""

from __future__ import annotations

from typing import Any

from kernels.runtime.lanes import Lanes


class Vectors(Lanes):
    """Vectors of sixteen numbers, single numbers, and addresses."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder)
        self.half, self.address = self.ir.IntType(16), self.ir.IntType(64)

    def offset(self, value: int) -> Any:
        """A constant to compute addresses with."""
        return self.ir.Constant(self.address, value)

    def read(self, address: Any, kind: Any) -> Any:
        """What lies at an address, as a value of the type `kind`."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def bits_as_floats(self, words: Any) -> Any:
        """Bits as floats: those of a vector, or of one word."""
        one = words.type == self.word
        return self.builder.bitcast(words, self.float if one else self.floats)

    def even_and_odd(self, pairs: Any) -> tuple[Any, Any]:
        """Words that each hold two bf16 -> the even ones and the odd ones as floats."""
        b = self.builder
        even, odd = b.shl(pairs, self.integer(16)), b.and_(pairs, self.integer(0xFFFF0000))
        return self.bits_as_floats(even), self.bits_as_floats(odd)

    def load_floats(self, address: Any, narrow: bool) -> Any:
        """Sixteen floats, of fp32 or of bf16 in memory."""
        return self.bf16(address) if narrow else self.load(address, self.float)

    def store_floats(self, values: Any, address: Any, narrow: bool) -> None:
        """Store sixteen floats as fp32 or as bf16."""
        if narrow:
            self.to_bf16(values, address)
        else:
            self.store(values, address)

    def wide(self, bits: Any) -> Any:
        """The bits of one bf16 as a float."""
        b = self.builder
        return self.bits_as_floats(b.shl(b.zext(bits, self.word), self.word(16)))

    def narrow(self, value: Any) -> Any:
        """The bits of the bf16 next to one finite float, a tie going to the even one."""
        b, shift = self.builder, self.word(16)
        bits = b.bitcast(value, self.word)
        odd = b.and_(b.lshr(bits, shift), self.word(1))
        return b.trunc(b.lshr(b.add(b.add(bits, self.word(0x7FFF)), odd), shift), self.half)

    def total(self, values: Any) -> Any:
        """The sum of the lanes."""
        b, name = self.builder, "llvm.vector.reduce.fadd.v16f32"
        kind = self.ir.FunctionType(self.float, [self.float, self.floats])
        function = b.module.globals.get(name) or self.ir.Function(b.module, kind, name)
        return b.call(function, [self.float(0.0), values], fastmath=("reassoc",))
