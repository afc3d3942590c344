"""The loop of x W^T for few rows of x, compiled.

A tile is the outputs of all rows of x for some rows of W: sixteen columns at a time are multiplied
and added in fp32, every lane by itself, and the lanes are added up in the end. bf16 and codes are
read in pairs: even columns in one vector, odd ones in another. Where several rows of x are read
often, they are put in that order before. Rows
beyond the last, of x and of W, repeat it, so that no tile is a special one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.few_rows.vectors import Vectors
from kernels.nf4.decode_compiled import look_up
from kernels.nf4.weight import NESTED_BLOCK
from kernels.runtime.lanes import LANES

MOST_ROWS = 8
CHUNK = 2 * LANES
"""Columns that are read at a time."""

_INT8_STEPS = 127.0


@dataclass(frozen=True)
class LoopKind:
    """What a loop is compiled for.

    `weight` is float32, bfloat16, nf4, nested (NF4 with scales in 8 bits) or int8. `narrow`
    activations and outputs are bf16, else fp32; there are at most `rows`. `woven` activations are
    fp32 that were put in the order in which they are read (`weave`). `block` are the elements that
    share a scale in NF4.
    """

    weight: str
    narrow: bool
    rows: int
    permutes: bool
    woven: bool = False
    block: int = 64

    @property
    def outputs(self) -> int:
        """Rows of W in a tile: as many as leave its sums in registers."""
        return 4 if self.rows <= 4 else 2

    @property
    def chunk_bytes(self) -> int:
        """Bytes of `CHUNK` weights."""
        bits = {"float32": 32, "bfloat16": 16, "int8": 8}.get(self.weight, 4)
        return CHUNK * bits // 8

    @property
    def is_nf4(self) -> bool:
        return self.weight in ("nf4", "nested")


@functools.cache
def product_loop(kind: LoopKind) -> Any:
    """The loop `(weight, x, out, scales, add, begin, end)` over rows `begin:end` of W.

    `weight` is (address, bytes of a row, columns), `x` and `out` are (address, bytes of a row,
    number of the last row), and `scales` is (address, address of the nested ones, offset). With
    `add` products are added to what is in `out`. It runs without Python's lock. Compiling takes
    some tenths of a second.
    """
    from numba import njit

    tile, outputs, table = _intrinsic(kind), kind.outputs, dynamic_map(True).data_ptr()

    def loop(weight, x, out, scales, add, begin, end):  # type: ignore[no-untyped-def]
        for first in range(begin, end, outputs):
            tile(weight, x, out, scales, (table, add), first, end - 1)

    return njit(nogil=True)(loop)


def weave(x: Tensor) -> Tensor:
    """x (N, in) as fp32 in the order of woven activations: even columns of a chunk, then odd."""
    chunks = x.float().view(x.shape[0], -1, LANES, 2)
    return chunks.transpose(2, 3).contiguous().view(x.shape)


def _intrinsic(kind: LoopKind) -> Any:
    """`tile(weight, x, out, scales, (table, add), first, last)`, as numba inlines it."""
    from numba import types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Tile(Vectors(builder), kind, args).write()
        return context.get_dummy_value()

    def tile(typing_context, weight, x, out, scales, more, first, last):  # type: ignore[no-untyped-def]
        return types.void(weight, x, out, scales, more, types.intp, types.intp), generate

    return intrinsic(tile)


class _Tile:
    """LLVM instructions for one tile."""

    def __init__(self, vectors: Vectors, kind: LoopKind, args: Any) -> None:
        self.v, self.kind = vectors, kind
        b = vectors.builder
        self.weight, self.x, self.out, self.scales = (
            [b.extract_value(group, index) for index in range(3)] for group in args[:4]
        )
        self.table, self.add = (b.extract_value(args[4], index) for index in range(2))
        first, last = args[5:]
        self.wanted = [self._least(first, i, last) for i in range(kind.outputs)]
        self.rows = [self._least(vectors.offset(0), r, self.x[2]) for r in range(kind.rows)]

    def write(self) -> None:
        """Multiply and add up over all columns, then write the sums."""
        from numba.core import cgutils

        v, b, kind = self.v, self.v.builder, self.kind
        step = kind.block if kind.is_nf4 else CHUNK
        pairs = [(o, r) for o in range(kind.outputs) for r in range(kind.rows)]
        sums = {pair: cgutils.alloca_once_value(b, v.number(0.0)) for pair in pairs}
        starts = [b.add(self.weight[0], b.mul(row, self.weight[1])) for row in self.wanted]
        inputs = [b.add(self.x[0], b.mul(row, self.x[1])) for row in self.rows]
        steps = b.udiv(self.weight[2], v.offset(step))
        with cgutils.for_range(b, steps) as loop:
            scales = [self._scale(row, steps, loop.index) for row in self.wanted]
            totals = {pair: b.load(sums[pair]) for pair in pairs}
            for chunk in range(step // CHUNK):
                at = b.add(b.mul(loop.index, v.offset(step // CHUNK)), v.offset(chunk))
                xs = [self._inputs(start, at) for start in inputs]
                for o, start in enumerate(starts):
                    weights = self._weights(start, at, scales[o])
                    for r, x in enumerate(xs):
                        for weight, value in zip(weights, x, strict=True):
                            totals[o, r] = v.fma(weight, value, totals[o, r])
            for pair, total in totals.items():
                b.store(total, sums[pair])
        self._store({pair: v.total(b.load(sums[pair])) for pair in pairs})

    def _inputs(self, start: Any, chunk: Any) -> tuple[Any, Any]:
        """`CHUNK` activations of a row, in the order of `_weights`."""
        v, b = self.v, self.v.builder
        kind = self.kind
        size = 2 if kind.narrow and not kind.woven else 4
        at = b.add(start, b.mul(chunk, v.offset(size * CHUNK)))
        if size == 2:
            return v.even_and_odd(v.read(at, v.words))
        first, second = self._halves(at)
        if kind.woven or kind.weight == "float32":
            return first, second
        even, odd = ([lane + odd for lane in range(0, CHUNK, 2)] for odd in (0, 1))
        return (
            b.shuffle_vector(first, second, v.constant(v.word, even)),
            b.shuffle_vector(first, second, v.constant(v.word, odd)),
        )

    def _halves(self, at: Any) -> tuple[Any, Any]:
        """32 floats, in their order."""
        v, b = self.v, self.v.builder
        floats = v.floats
        return v.read(at, floats), v.read(b.add(at, v.offset(4 * LANES)), floats)

    def _weights(self, start: Any, chunk: Any, scale: Any) -> tuple[Any, Any]:
        """`CHUNK` weights of a row: even and odd ones; of fp32 the first and the second half."""
        v, b = self.v, self.v.builder
        at = b.add(start, b.mul(chunk, v.offset(self.kind.chunk_bytes)))
        if self.kind.weight == "float32":
            return self._halves(at)
        if self.kind.weight == "bfloat16":
            return v.even_and_odd(v.read(at, v.words))
        words = v.words
        if self.kind.weight == "int8":
            pairs = b.sext(v.read(at, v.vector(v.half)), words)
            even = b.ashr(b.shl(pairs, v.integer(24)), v.integer(24))
            odd = b.ashr(pairs, v.integer(8))
            floats = v.floats
            return b.sitofp(even, floats), b.sitofp(odd, floats)
        codes, permutes = b.zext(v.read(at, v.vector(v.byte)), words), self.kind.permutes
        # The even element has the high nibble.
        even = look_up(v, b.lshr(codes, v.integer(4)), permutes)
        odd = look_up(v, b.and_(codes, v.integer(15)), permutes)
        return b.fmul(even, scale), b.fmul(odd, scale)

    def _scale(self, row: Any, steps: Any, step: Any) -> Any:
        """The scale of a block of NF4, in every lane; None for other weights."""
        if not self.kind.is_nf4:
            return None
        v, b = self.v, self.v.builder
        block = b.add(b.mul(row, steps), step)
        absmax, nested, offset = self.scales
        if self.kind.weight == "nf4":
            return v.same(self._float_at(absmax, block))
        code = b.zext(v.read(b.add(absmax, block), v.byte), v.address)
        narrow = b.fptrunc(offset, v.float)
        outer = self._float_at(nested, b.udiv(block, v.offset(NESTED_BLOCK)))
        return v.same(b.fadd(b.fmul(self._float_at(self.table, code), outer), narrow))

    def _float_at(self, address: Any, index: Any) -> Any:
        v, b = self.v, self.v.builder
        return v.read(b.add(address, b.mul(index, v.offset(4))), v.float)

    def _store(self, sums: dict[tuple[int, int], Any]) -> None:
        """Write a tile's sums, or add them to what is there; of narrow ones each rounded once."""
        v, b = self.v, self.v.builder
        add = b.icmp_signed("!=", self.add, v.offset(0))
        kind = v.half if self.kind.narrow else v.float
        targets, values = dict[tuple[int, int], Any](), dict[tuple[int, int], Any]()
        for (o, r), total in sums.items():
            if self.kind.weight == "int8":
                step = b.fdiv(self._float_at(self.scales[0], self.wanted[o]), v.float(_INT8_STEPS))
                total = b.fmul(total, step)
            at = b.add(self.out[0], b.mul(self.rows[r], self.out[1]))
            at = b.add(at, b.mul(self.wanted[o], v.offset(2 if self.kind.narrow else 4)))
            before = v.read(at, kind)
            if self.kind.narrow:
                before = v.wide(before)
            targets[o, r] = at
            values[o, r] = b.fadd(total, b.select(add, before, v.float(0.0)))
        # A row that is repeated must not be added twice: all are read before any is written.
        for pair, value in values.items():
            if self.kind.narrow:
                value = v.narrow(value)
            b.store(value, b.inttoptr(targets[pair], value.type.as_pointer()), align=1)

    def _least(self, first: Any, offset: int, last: Any) -> Any:
        """first + offset, or `last` where that is less."""
        v, b = self.v, self.v.builder
        index = b.add(first, v.offset(offset))
        return b.select(b.icmp_signed("<", index, last), index, last)
