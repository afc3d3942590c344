"""RMSNorm, rotation and SwiGLU of few rows, in one compiled call each.

`kernels.elementwise` has the maths, and every value is rounded where its references round it:
results may differ in the last bits of a sum and of exp. Rows may be those of wider matrices.
`kernels.few_rows.product.takes_rows` says of which rows there are loops.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels.few_rows.vectors import Vectors
from kernels.runtime.lanes import LANES


def takes_width(width: int) -> bool:
    """Whether there are loops for rows, or halves of heads, of so many elements."""
    return width % LANES == 0


def norm_rows(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """norm(x) (N, H) with the factor w, or 1 + w; with an `addend` norm(x + addend), the sum in it.

    All have the dtype of x, fp32 or bf16. The addend shares no memory with x.
    """
    rows, width = x.shape
    out, size = x.new_empty(rows, width), x.itemsize
    total = x if addend is None else addend
    _norm_loop(x.dtype == torch.bfloat16, addend is not None, zero_centered)(
        rows,
        width,
        eps,
        weight.data_ptr(),
        (x.data_ptr(), x.stride(0) * size),
        (total.data_ptr(), total.stride(0) * size),
        (out.data_ptr(), width * size),
    )
    return out


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x (N, heads, D) in place by cos, sin (N, D / 2), fp32 and contiguous."""
    tokens, heads, dim = x.shape
    pitches = (x.stride(0) * x.itemsize, x.stride(1) * x.itemsize)
    loop = _rotation_loop(x.dtype == torch.bfloat16)
    loop(tokens, heads, dim // 2, x.data_ptr(), pitches, (cos.data_ptr(), sin.data_ptr()))


def gate_rows(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (N, I) of the halves of gate_up (N, 2 I), contiguous fp32 or bf16."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    loop = _gate_loop(gate_up.dtype == torch.bfloat16)
    loop(rows, width, width * gate_up.itemsize, gate_up.data_ptr(), out.data_ptr())
    return out


@functools.cache
def _norm_loop(narrow: bool, adds: bool, centred: bool) -> Any:
    """The loop over rows for fp32 or bf16. It runs without Python's lock."""
    from numba import njit, types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _NormOfRow(Vectors(builder), narrow, adds, centred).write(*args)
        return context.get_dummy_value()

    def norm(  # type: ignore[no-untyped-def]
        typing_context, width, eps, weight, x, total, out
    ):
        address = types.intp
        return types.void(address, types.float64, *[address] * 4), generate

    row_norm = intrinsic(norm)

    def loop(rows, width, eps, weight, x, total, out):  # type: ignore[no-untyped-def]
        for row in range(rows):
            row_norm(
                width, eps, weight, x[0] + row * x[1], total[0] + row * total[1],
                out[0] + row * out[1],
            )  # fmt: skip

    return njit(nogil=True)(loop)


@functools.cache
def _rotation_loop(narrow: bool) -> Any:
    """The loop over tokens and heads for fp32 or bf16. It runs without Python's lock."""
    from numba import njit, types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _rotate_head(Vectors(builder), narrow, *args)
        return context.get_dummy_value()

    def rotate(typing_context, half, head, cos, sin):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 4), generate

    rotate_head = intrinsic(rotate)

    def loop(tokens, heads, half, start, pitches, angles):  # type: ignore[no-untyped-def]
        for token in range(tokens):
            skip = 4 * half * token
            for head in range(heads):
                at = start + token * pitches[0] + head * pitches[1]
                rotate_head(half, at, angles[0] + skip, angles[1] + skip)

    return njit(nogil=True)(loop)


@functools.cache
def _gate_loop(narrow: bool) -> Any:
    """The loop over rows for fp32 or bf16. It runs without Python's lock."""
    from numba import njit, types
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _gate_row(Vectors(builder), narrow, *args)
        return context.get_dummy_value()

    def gate(typing_context, width, gate, up, out):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 4), generate

    gate_row = intrinsic(gate)

    def loop(rows, width, size, start, out):  # type: ignore[no-untyped-def]
        for row in range(rows):
            at = start + 2 * size * row
            gate_row(width, at, at + size, out + size * row)

    return njit(nogil=True)(loop)


class _NormOfRow:
    """LLVM instructions for the norm of one row."""

    def __init__(self, vectors: Vectors, narrow: bool, adds: bool, centred: bool) -> None:
        self.v, self.narrow, self.adds, self.centred = vectors, narrow, adds, centred

    def write(self, width: Any, eps: Any, weight: Any, x: Any, total: Any, out: Any) -> None:
        """The sum of squares, and of x and the addend; then the products."""
        from numba.core import cgutils

        v, b, size = self.v, self.v.builder, 2 if self.narrow else 4
        steps = b.udiv(width, v.offset(LANES))
        squares = cgutils.alloca_once_value(b, v.number(0.0))
        with cgutils.for_range(b, steps) as loop:
            at = b.mul(loop.index, v.offset(LANES * size))
            value = v.load_floats(b.add(total, at), self.narrow)
            if self.adds:
                value = b.fadd(value, v.load_floats(b.add(x, at), self.narrow))
                value = v.rounded(value) if self.narrow else value
                v.store_floats(value, b.add(total, at), self.narrow)
            b.store(v.fma(value, value, b.load(squares)), squares)
        count = b.uitofp(width, v.float)
        mean = b.fdiv(v.total(b.load(squares)), count)
        root = v.call("llvm.sqrt.f32", b.fadd(mean, b.fptrunc(eps, v.float)))
        scale = v.same(b.fdiv(v.float(1.0), root))
        with cgutils.for_range(b, steps) as loop:
            at = b.mul(loop.index, v.offset(LANES * size))
            value = b.fmul(v.load_floats(b.add(total, at), self.narrow), scale)
            factor = v.load_floats(b.add(weight, at), self.narrow)
            if self.centred:
                factor = b.fadd(factor, v.number(1.0))
            elif self.narrow:  # the normed value is rounded before the product
                value = v.rounded(value)
            v.store_floats(b.fmul(value, factor), b.add(out, at), self.narrow)


def _rotate_head(v: Vectors, narrow: bool, half: Any, head: Any, cos: Any, sin: Any) -> None:
    """LLVM instructions that rotate one head in place."""
    from numba.core import cgutils

    b, size = v.builder, 2 if narrow else 4
    second_half = b.add(head, b.mul(half, v.offset(size)))
    with cgutils.for_range(b, b.udiv(half, v.offset(LANES))) as loop:
        at, angle = (b.mul(loop.index, v.offset(LANES * bytes_)) for bytes_ in (size, 4))
        low, high = b.add(head, at), b.add(second_half, at)
        first, second = v.load_floats(low, narrow), v.load_floats(high, narrow)
        c, s = (v.load_floats(b.add(start, angle), False) for start in (cos, sin))
        v.store_floats(b.fsub(b.fmul(first, c), b.fmul(second, s)), low, narrow)
        v.store_floats(b.fadd(b.fmul(second, c), b.fmul(first, s)), high, narrow)


def _gate_row(v: Vectors, narrow: bool, width: Any, gate: Any, up: Any, out: Any) -> None:
    """LLVM instructions for silu(gate) * up of one row."""
    from numba.core import cgutils

    b, size = v.builder, 2 if narrow else 4
    with cgutils.for_range(b, b.udiv(width, v.offset(LANES))) as loop:
        at = b.mul(loop.index, v.offset(LANES * size))
        g, u = (v.load_floats(b.add(start, at), narrow) for start in (gate, up))
        v.store_floats(v.mul(v.mul(g, v.sigmoid(g)), u), b.add(out, at), narrow)
