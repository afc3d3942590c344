"""NF4 decoding inside a Triton kernel, with byte permutes as lookup table.

Maths. A block of 64 codes c with scale s stands for `round(NF4_CODE[c] * s)`, one rounding from the
exact fp32 product to bf16 or fp16, which is what bitsandbytes computes. Sixteen values per block
are few enough to form once and look up 64 times:

1. `t[i] = round(NF4_CODE[i] * s)`, split into low and high bytes: 2 x 16 bytes, 8 registers.
2. The instruction PRMT picks four bytes out of eight by four selectors of 3 bits, so the packed
   codes are the selectors as they lie in memory. Two PRMT look up codes 0-7 and 8-15, bit 3 of each
   code (spread over a byte by PRMT's sign mode) chooses between them, and this twice, for the low
   and the high bytes. A last PRMT joins the bytes to values. It costs 2.7 instructions per value.

Two packings are read. bitsandbytes' order has elements 2j and 2j+1 in the high and low nibble of
byte j. The planar order (`kernels.nf4.planar`) has elements j, 16+j, 32+j, 48+j of a block in the
nibbles 0..3 of 16-bit word j, so that each nibble position is a contiguous run of 16 columns.
A transposed result has neighbouring rows side by side: there two rows are decoded at once, each
with its own table, and the last PRMTs join a value of one to that of the other, half an instruction
more per value.

The instructions are inline PTX. Each has a twin in plain Triton, chosen by the constexpr `PTX`,
which the interpreter runs and which fp32 results use. Products and sums that must not be fused into
one rounding are written as `mul.rn` and `add.rn`, which no compiler flag changes.
"""

from __future__ import annotations

import os
import struct

from kernels.nf4.weight import NF4_CODE
from kernels.runtime.triton_support import jit, tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, which knows no PTX."""


def _hex(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _table(round_pair: str) -> str:
    """PTX for the 8 byte-plane registers of a scale: low bytes in $0..$3, high ones in $4..$7.

    `round_pair` rounds the fp32 registers {even}, {odd} to 16 bits each, into p{i}.
    """
    products = [f"mul.rn.f32 v{i}, $8, {_hex(v)};" for i, v in enumerate(NF4_CODE.tolist())]
    rounded = [round_pair.format(i=i, even=f"v{2 * i}", odd=f"v{2 * i + 1}") for i in range(8)]
    split = [
        f"prmt.b32 ${4 * high + i}, p{2 * i}, p{2 * i + 1}, {selector};"
        for high, selector in enumerate(("0x6420", "0x7531"))
        for i in range(4)
    ]
    declared = [".reg .f32 v<16>;", ".reg .b32 p<8>;", ".reg .b16 e, o;"]
    return "\n".join(["{", *declared, *products, *rounded, *split, "}"])


def _lookup(
    selectors: str,
    mask: str,
    low: str,
    high: str,
    copies: int,
    codes: int = 4,
    table: int = 5,
) -> list[str]:
    """PTX that decodes the four codes in the low 16 bits of `selectors` to bytes `low`, `high`.

    Operand `codes` holds 8 codes; `mask` says where bit 3 of each of the four lies in it and in
    t, the same shifted left by a nibble. The table begins at operand `table`, `copies` of each of
    its registers one after the other.
    """
    lines = [f"prmt.b32 m, ${codes}, t, {mask};"]
    for plane, target in ((0, low), (4, high)):
        t = [f"${table + copies * (plane + i)}" for i in range(4)]
        lines += [
            f"prmt.b32 a, {t[0]}, {t[1]}, {selectors};",
            f"prmt.b32 b, {t[2]}, {t[3]}, {selectors};",
            f"lop3.b32 {target}, a, b, m, 0xd8;",
        ]
    return lines


def _words() -> str:
    """Four bytes in bitsandbytes' order to four words of two values each, as they lie in memory."""
    return "\n".join(
        [
            "{",
            ".reg .b32 s, t, m, a, b, l0, h0, l1, h1;",
            "and.b32 s, $4, 0x77777777;",
            "shl.b32 t, $4, 4;",
            *_lookup("s", "0x9d8c", "l0", "h0", 1),
            "shr.u32 s, s, 16;",
            *_lookup("s", "0xbfae", "l1", "h1", 1),
            "prmt.b32 $0, l0, h0, 0x4051;",
            "prmt.b32 $1, l0, h0, 0x6273;",
            "prmt.b32 $2, l1, h1, 0x4051;",
            "prmt.b32 $3, l1, h1, 0x6273;",
            "}",
        ]
    )


def _planes(copies: int) -> str:
    """Two 16-bit planar words to one word of two values for each of the four planes."""
    return "\n".join(
        [
            "{",
            ".reg .b32 s, c, t, m, a, b, l, h;",
            "and.b32 s, $4, 0x77777777;",
            "shl.b32 t, $4, 4;",
            "prmt.b32 c, s, s, 0x0020;",
            *_lookup("c", "0xae8c", "l", "h", copies),
            "prmt.b32 $0, l, h, 0x6240;",
            "prmt.b32 $1, l, h, 0x7351;",
            "prmt.b32 c, s, s, 0x0031;",
            *_lookup("c", "0xbf9d", "l", "h", copies),
            "prmt.b32 $2, l, h, 0x6240;",
            "prmt.b32 $3, l, h, 0x7351;",
            "}",
        ]
    )


def _columns() -> str:
    """Two planar words of each of two rows to one word of two rows for each of the 8 columns."""
    lines = ["{", ".reg .b32 t, m, a, b, s<2>, l<2>, h<2>, x, y;"]
    for half, mask in enumerate(("0x9d8c", "0xbfae")):
        for row in (0, 1):
            lines += [f"and.b32 s{row}, ${8 + row}, 0x77777777;", f"shl.b32 t, ${8 + row}, 4;"]
            lines += [f"shr.u32 s{row}, s{row}, 16;"] * half
            lines += _lookup(f"s{row}", mask, f"l{row}", f"h{row}", 2, 8 + row, 10 + row)
        for pair, bytes_of in enumerate(("0x5140", "0x7362")):
            lines += [
                f"prmt.b32 x, l0, h0, {bytes_of};",
                f"prmt.b32 y, l1, h1, {bytes_of};",
                f"prmt.b32 ${4 * half + 2 * pair}, x, y, 0x5410;",
                f"prmt.b32 ${4 * half + 2 * pair + 1}, x, y, 0x7632;",
            ]
    return "\n".join([*lines, "}"])


TABLE_BF16_PTX = _table("cvt.rn.bf16x2.f32 p{i}, {odd}, {even};")
# One value at a time, because the paired conversion to fp16 begins with sm_80 and fp16 with sm_75.
TABLE_FP16_PTX = _table(
    "cvt.rn.f16.f32 e, {even};\ncvt.rn.f16.f32 o, {odd};\nmov.b32 p{i}, {{e, o}};"
)
TABLE_CONSTRAINTS = ",".join(["=r"] * 8 + ["f"])
# Outputs are written while inputs are still to be read: "&" keeps their registers apart.
LOOKUP_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 9)
WORDS_PTX = _words()
PLANES_PTX = _planes(1)
# In the operand of a product every value is an element of its own. The compiler then hands over two
# neighbouring codes in one register, and two copies of their table, which must be the same one: the
# pair must lie in one row. `bench.compile.report` checks that in each layout the compiler chooses.
PACKED_PLANES_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 17)
PACKED_PLANES_PTX = _planes(2)
# Rows come in pairs, codes and tables alike, so any two elements of a thread may be one.
COLUMNS_CONSTRAINTS = ",".join(["=&r"] * 8 + ["r"] * 18)
COLUMNS_PTX = _columns()
SCALE_PTX = "{\n.reg .f32 t;\nmul.rn.f32 t, $1, $2;\nadd.rn.f32 $0, t, $3;\n}"
SCALE_CONSTRAINTS = "=f,f,f,f"

_TABLE_BF16 = tl.constexpr(TABLE_BF16_PTX)
_TABLE_FP16 = tl.constexpr(TABLE_FP16_PTX)
_TABLE_CONSTRAINTS = tl.constexpr(TABLE_CONSTRAINTS)
_LOOKUP_CONSTRAINTS = tl.constexpr(LOOKUP_CONSTRAINTS)
_WORDS = tl.constexpr(WORDS_PTX)
_PLANES = tl.constexpr(PLANES_PTX)
_PACKED_PLANES = tl.constexpr(PACKED_PLANES_PTX)
_PACKED_PLANES_CONSTRAINTS = tl.constexpr(PACKED_PLANES_CONSTRAINTS)
_COLUMNS = tl.constexpr(COLUMNS_PTX)
_COLUMNS_CONSTRAINTS = tl.constexpr(COLUMNS_CONSTRAINTS)
_SCALE = tl.constexpr(SCALE_PTX)
_SCALE_CONSTRAINTS = tl.constexpr(SCALE_CONSTRAINTS)


@jit
def nested_scale(value, nested, offset, PTX: tl.constexpr):
    """value * nested + offset in fp32 with two roundings."""
    # One fused multiply-add would round once; bitsandbytes rounds twice.
    if PTX:
        return tl.inline_asm_elementwise(
            _SCALE,
            _SCALE_CONSTRAINTS,
            [value, nested, offset],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return value * nested + offset


@jit
def code_value(code):
    """NF4_CODE[code] in fp32, by a tree of selections on the four bits of an integer `code`."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    v0 = tl.where(b0, -0.6961928009986877, -1.0)
    v1 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(b0, 0.0, -0.09105003625154495)
    v4 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
    high = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
    return tl.where((code & 8) != 0, high, low)


@jit
def _byte_planes(scale, DTYPE: tl.constexpr):
    """The 8 table registers (uint32) of each fp32 scale."""
    table: tl.constexpr = _TABLE_BF16 if DTYPE == tl.bfloat16 else _TABLE_FP16
    return tl.inline_asm_elementwise(
        table, _TABLE_CONSTRAINTS, [scale], is_pure=True, pack=1,
        dtype=(
            tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32
        ),
    )  # fmt: skip


@jit
def decode_words(codes, scale, DTYPE: tl.constexpr):
    """int32 (R, C) of 8 codes in bitsandbytes' order, scale fp32 (R, 1) -> 4 x uint32 (R, C).

    Each result holds two neighbouring values, the first in its low half. PTX only.
    """
    t0, t1, t2, t3, t4, t5, t6, t7 = _byte_planes(scale, DTYPE)
    codes, t0 = tl.broadcast(codes, t0)
    return tl.inline_asm_elementwise(
        _WORDS,
        _LOOKUP_CONSTRAINTS,
        [codes, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@jit
def decode_plane_words(codes, scale, DTYPE: tl.constexpr):
    """int32 (R, C) of two planar words, scale fp32 (R, 1) -> the four planes as uint32 (R, C).

    Each result holds two neighbouring values, the first in its low half. PTX only.
    """
    t0, t1, t2, t3, t4, t5, t6, t7 = _byte_planes(scale, DTYPE)
    codes, t0 = tl.broadcast(codes, t0)
    return tl.inline_asm_elementwise(
        _PLANES,
        _LOOKUP_CONSTRAINTS,
        [codes, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@jit
def _rounded(value, DTYPE: tl.constexpr):
    """fp32 to DTYPE, to nearest even. Bit by bit for bf16: the interpreter's cast cuts bits off."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@jit
def decode_pair(packed, scale, DTYPE: tl.constexpr):
    """bytes uint8 (R, C), scale (R, 1) -> the even and the odd elements (R, C) in plain Triton."""
    byte = packed.to(tl.int32)
    even = _rounded(code_value(byte >> 4) * scale, DTYPE)
    odd = _rounded(code_value(byte & 15) * scale, DTYPE)
    return even, odd


@jit
def decode_planes(words, scale, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """planar words int16 (R, C), scale fp32 (R, 1) -> the four planes (R, C) in DTYPE."""
    # pack=2: two neighbouring codes of a row share a register, and so do the two values of a
    # result, which is how tensor cores read them.
    if PTX and DTYPE == tl.bfloat16:
        t0, t1, t2, t3, t4, t5, t6, t7 = _byte_planes(scale, DTYPE)
        return tl.inline_asm_elementwise(
            _PACKED_PLANES,
            _PACKED_PLANES_CONSTRAINTS,
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif PTX and DTYPE == tl.float16:
        t0, t1, t2, t3, t4, t5, t6, t7 = _byte_planes(scale, DTYPE)
        return tl.inline_asm_elementwise(
            _PACKED_PLANES,
            _PACKED_PLANES_CONSTRAINTS,
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        word = words.to(tl.int32)
        return (
            _rounded(code_value(word & 15) * scale, DTYPE),
            _rounded(code_value((word >> 4) & 15) * scale, DTYPE),
            _rounded(code_value((word >> 8) & 15) * scale, DTYPE),
            _rounded(code_value((word >> 12) & 15) * scale, DTYPE),
        )


@jit
def decode_columns(words, scale, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int32 (R,) of two planar words j, j + 1, scale fp32 (R,) -> 8 columns (R,) in DTYPE.

    They are j, 16 + j, 32 + j, 48 + j, and then their right neighbours.
    """
    # pack=2: a thread's rows in pairs, whose values of one column leave in one register.
    if PTX:
        t0, t1, t2, t3, t4, t5, t6, t7 = _byte_planes(scale, DTYPE)
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            _COLUMNS, _COLUMNS_CONSTRAINTS, [words, t0, t1, t2, t3, t4, t5, t6, t7], is_pure=True,
            dtype=(
                tl.uint16, tl.uint16, tl.uint16, tl.uint16,
                tl.uint16, tl.uint16, tl.uint16, tl.uint16,
            ), pack=2,
        )  # fmt: skip
        return (
            c0.to(DTYPE, bitcast=True),
            c1.to(DTYPE, bitcast=True),
            c2.to(DTYPE, bitcast=True),
            c3.to(DTYPE, bitcast=True),
            c4.to(DTYPE, bitcast=True),
            c5.to(DTYPE, bitcast=True),
            c6.to(DTYPE, bitcast=True),
            c7.to(DTYPE, bitcast=True),
        )
    else:
        return (
            _rounded(code_value(words & 15) * scale, DTYPE),
            _rounded(code_value((words >> 4) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 8) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 12) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 16) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 20) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 24) & 15) * scale, DTYPE),
            _rounded(code_value((words >> 28) & 15) * scale, DTYPE),
        )


@jit
def code_scale(code, value_map, nested, index, offset, inside, PTX: tl.constexpr):
    """fp32 scales from their codes, with double quantisation; `index` is that of nested scales."""
    value = tl.load(value_map + code.to(tl.int32), mask=inside, other=0.0)
    return nested_scale(value, tl.load(nested + index, mask=inside, other=0.0), offset, PTX)


@jit
def block_scale(
    absmax, value_map, nested, offset, at, index, inside, NESTED: tl.constexpr,
    NESTED_SHIFT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """fp32 scales of blocks, at `at` of `absmax`; not to be used where not `inside`.

    With double quantisation (NESTED) `index >> NESTED_SHIFT` is the index of a nested scale and
    `offset` the number that all scales were reduced by.
    """
    if NESTED:
        code = tl.load(absmax + at, mask=inside, other=0)
        return code_scale(code, value_map, nested, index >> NESTED_SHIFT, offset, inside, PTX)
    else:
        return tl.load(absmax + at, mask=inside, other=0.0)
