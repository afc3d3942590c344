"""An emulator for the inline PTX of the kernels.

It runs the very string that the compiler is given.

Triton's interpreter knows no PTX, so an inline instruction sequence is proven here instead: every
operand is an array, one element per emulated thread, and the result is compared with plain
arithmetic over random and exhaustive inputs. Only the instructions that the kernels use are known;
any other raises. Source of the semantics: NVIDIA, "Parallel Thread Execution ISA", sections on
prmt, lop3, shl, shr, and, mov, cvt, mul and add.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_OUTPUT = re.compile(r"\$(\d+)")


class PtxError(ValueError):
    """The text is not PTX that this emulator knows, or breaks a rule of inline assembly."""


def statements(ptx: str) -> list[tuple[str, list[str]]]:
    """(opcode, operands) of each instruction; register declarations and the outer braces go."""
    body = ptx.strip()
    if not (body.startswith("{") and body.endswith("}")):
        raise PtxError("an inline sequence must be enclosed in braces")
    parsed = []
    for text in (part.strip() for part in body[1:-1].split(";")):
        if not text or text.startswith(".reg"):
            continue
        opcode, _, rest = text.partition(" ")
        # A comma inside {a, b} belongs to one operand.
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        parsed.append((opcode, operands))
    return parsed


def check_clobbers(ptx: str, constraints: str) -> None:
    """Raise PtxError if an output is written while an input is still to be read.

    Without "&" in its constraint an output may share its register with an input.
    """
    parts = constraints.split(",")
    outputs = [i for i, part in enumerate(parts) if part.startswith("=")]
    program = statements(ptx)
    last_read = max(
        position
        for position, (_, operands) in enumerate(program)
        for operand in operands[1:]
        if (match := _OUTPUT.fullmatch(operand)) and int(match[1]) not in outputs
    )
    for position, (_, operands) in enumerate(program):
        match = _OUTPUT.fullmatch(operands[0])
        if match is None:
            continue
        index = int(match[1])
        if index not in outputs:
            raise PtxError(f"operand ${index} is an input and is written")
        if position < last_read and "&" not in parts[index]:
            raise PtxError(f"output ${index} is written before the last input is read")


def run(ptx: str, outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """Execute `ptx`: operands $0..$(outputs-1) are written, the `inputs` follow them.

    Inputs are arrays of one shape; 32-bit floats travel as their bits. Returns the outputs.
    """
    registers: dict[str, Words] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for opcode, operands in statements(ptx):
        if opcode not in INSTRUCTIONS:
            raise PtxError(f"unknown instruction {opcode}")
        values = [_value(text, registers, inputs[0].shape) for text in operands[1:]]
        registers[operands[0]] = INSTRUCTIONS[opcode](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def _value(text: str, registers: dict[str, Words], shape: tuple[int, ...]) -> Words:
    if text.startswith("{"):
        low, high = (_value(part.strip(), registers, shape) for part in text[1:-1].split(","))
        return ((low & 0xFFFF) | (high << 16)).astype(np.uint32)
    if text.startswith("0f"):
        return np.full(shape, int(text[2:], 16), np.uint32)
    if text[0].isdigit():
        return np.full(shape, int(text, 0), np.uint32)
    if text not in registers:
        raise PtxError(f"{text} is read before it is written")
    return registers[text]


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Each nibble of `selector`'s low half picks a byte of {b, a}; bit 3 spreads its sign."""
    source = [(a >> (8 * i)) & 0xFF for i in range(4)] + [(b >> (8 * i)) & 0xFF for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = np.choose(nibble & 7, source).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte) << (8 * i)
    return result


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Any function of three bits, `table` holding its value for a=4, b=2, c=1."""
    result = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            term = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result |= term
    return result


def _floats(bits: Words) -> NDArray[np.float32]:
    return bits.view(np.float32)


def _to_16(dtype: torch.dtype) -> Callable[[Words], Words]:
    """Round fp32 to nearest even in `dtype`, by torch; bits in the low half."""

    def convert(bits: Words) -> Words:
        values = torch.from_numpy(_floats(np.ascontiguousarray(bits)).copy()).to(dtype)
        return values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    return convert


def _pair_of(dtype: torch.dtype) -> Callable[[Words, Words], Words]:
    """cvt of two floats: the first operand goes to the upper half."""
    convert = _to_16(dtype)
    return lambda high, low: ((convert(high) << 16) | convert(low)).astype(np.uint32)


def _mul(a: Words, b: Words) -> Words:
    return (_floats(a) * _floats(b)).view(np.uint32)


def _add(a: Words, b: Words) -> Words:
    return (_floats(a) + _floats(b)).view(np.uint32)


def _shift_left(a: Words, by: Words) -> Words:
    return np.where(by < 32, a << np.minimum(by, 31), 0).astype(np.uint32)


def _shift_right(a: Words, by: Words) -> Words:
    return np.where(by < 32, a >> np.minimum(by, 31), 0).astype(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "and.b32": np.bitwise_and,
    "shl.b32": _shift_left,
    "shr.u32": _shift_right,
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mul.rn.f32": _mul,
    "add.rn.f32": _add,
    "cvt.rn.bf16x2.f32": _pair_of(torch.bfloat16),
    "cvt.rn.f16.f32": _to_16(torch.float16),
}
