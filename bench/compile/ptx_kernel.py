"""Execute the final PTX of a whole kernel without a GPU.

Triton's interpreter runs a kernel's source, and `bench.compile.ptx_emulator` one inline sequence.
What lies between them, which element a layout gives to which thread, how wide an access is and
where it goes, is decided by the compiler. So this executes what the compiler wrote: every register
is an array with one element per thread, memory is one array of bytes, and an access that is not
aligned, lies outside every tensor, or writes a byte a second time raises. Only straight code runs:
no branches, no shared memory, no exchange between threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.compile.ptx_emulator import INSTRUCTIONS, PtxError

Wide = NDArray[np.uint64]

_STEP = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_PARAMETER = re.compile(r"_param_(\d+)\]")
_LOW = np.uint64(0xFFFFFFFF)
_GAP = 256


@dataclass(frozen=True)
class Step:
    """An instruction: its predicate ("" for none), whether that is negated, name and operands."""

    predicate: str
    negated: bool
    name: str
    operands: tuple[str, ...]


class Memory:
    """Bytes with tensors in them, and which of the bytes belong to one or have been written."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xAB, np.uint8)
        self.owned = np.zeros(size, bool)
        self.written = np.zeros(size, bool)
        self._next = _GAP

    def store(self, tensor: Tensor) -> int:
        """Copy a contiguous tensor in; returns its address, a multiple of 256."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        address = self._next
        self.bytes[address : address + raw.size] = raw
        self.owned[address : address + raw.size] = True
        self._next += -(-raw.size // _GAP) * _GAP + _GAP
        return address

    def tensor(self, address: int, like: Tensor) -> Tensor:
        """The tensor of the shape and dtype of `like` at `address`."""
        size = like.numel() * like.element_size()
        raw = torch.from_numpy(self.bytes[address : address + size].copy())
        return raw.view(like.dtype).view(like.shape)

    def at(self, address: NDArray[np.int64], size: int, count: int) -> NDArray[np.int64]:
        """The bytes (threads, size) of an access of `count` elements; `address` is of the first."""
        if bool((address % (size * count) != 0).any()):
            raise PtxError(f"an access of {size * count} bytes is not aligned to them")
        index: NDArray[np.int64] = address[:, None] + np.arange(size * count)
        if not bool(self.owned[index].all()):
            raise PtxError("an access lies outside every tensor")
        return index


def steps(ptx: str) -> list[Step]:
    """The instructions of the one kernel in `ptx`."""
    text = re.sub(r"//[^\n]*|\.loc[^\n]*|\$L\w+:", "", ptx)
    body = text[text.index(".reqntid") :]
    program_steps = []
    for part in body[body.index("{") + 1 : body.index("ret;")].split(";"):
        words = part.strip().lstrip("{} \t\n")
        if not words or words.startswith("."):
            continue
        match = _STEP.match(words)
        if match is None:
            raise PtxError(f"not an instruction: {words[:60]}")
        negated, predicate, name, rest = match.groups()
        operands = tuple(_OPERAND.findall(rest))
        program_steps.append(Step(predicate or "", negated == "!", name, operands))
    return program_steps


def execute(
    program: Sequence[Step],
    arguments: Sequence[int],
    memory: Memory,
    grid: tuple[int, int],
    threads: int,
) -> None:
    """Run every program of `grid`, one after another, with `threads` threads each."""
    for y in range(grid[1]):
        for x in range(grid[0]):
            _Program(arguments, memory, (x, y), threads).run(program)


class _Program:
    def __init__(
        self, arguments: Sequence[int], memory: Memory, program: tuple[int, int], threads: int
    ) -> None:
        self.arguments = [*arguments, 0, 0]
        self.memory = memory
        self.threads = threads
        self.predicates: dict[str, NDArray[np.bool_]] = {}
        self.registers: dict[str, Wide] = {
            "%tid.x": np.arange(threads, dtype=np.uint64),
            "%ctaid.x": self._all(program[0]),
            "%ctaid.y": self._all(program[1]),
        }

    def _all(self, value: int) -> Wide:
        return np.full(self.threads, value & (2**64 - 1), np.uint64)

    def run(self, program: Sequence[Step]) -> None:
        for step in program:
            active = np.ones(self.threads, bool)
            if step.predicate:
                active = self.predicates[step.predicate] ^ step.negated
            kind = step.name.split(".")
            if kind[:2] == ["ld", "param"]:
                program_steps = _PARAMETER.search(step.operands[1])
                assert program_steps is not None
                self.registers[step.operands[0]] = self._all(self.arguments[int(program_steps[1])])
            elif kind[:2] == ["ld", "global"]:
                self._load(step, active)
            elif kind[:2] == ["st", "global"]:
                self._store(step, active)
            elif kind[0] == "setp":
                left, right = (self._value(text).view(np.int64) for text in step.operands[1:])
                self.predicates[step.operands[0]] = _COMPARISONS[step.name](left, right)
            elif step.name == "and.pred":
                first, second = (self.predicates[text] for text in step.operands[1:])
                self.predicates[step.operands[0]] = first & second
            elif kind[0] == "mov":
                self._move(step, 32 if kind[1].endswith("64") else 16)
            else:
                values = [self._value(text) for text in step.operands[1:]]
                self.registers[step.operands[0]] = _compute(step.name, values)

    def _value(self, text: str) -> Wide:
        if text.startswith("0f"):
            return self._all(int(text[2:], 16))
        if text[0].isdigit() or text[0] == "-":
            return self._all(int(text.rstrip("U"), 0))
        if text not in self.registers:
            raise PtxError(f"{text} is read before it is written")
        return self.registers[text]

    def _move(self, step: Step, half: int) -> None:
        """Also the forms that take a register apart, {a, b} = c, and join one, c = {a, b}."""
        target, source = step.operands
        low = np.uint64((1 << half) - 1)
        if target.startswith("{"):
            value = self._value(source)
            first, second = _names(target)
            self.registers[first] = value & low
            self.registers[second] = value >> np.uint64(half)
        elif source.startswith("{"):
            first, second = _names(source)
            upper = self._value(second) << np.uint64(half)
            self.registers[target] = (self._value(first) & low) | upper
        else:
            self.registers[target] = self._value(source)

    def _load(self, step: Step, active: NDArray[np.bool_]) -> None:
        names, size = _names(step.operands[0]), int(step.name[-2:].lstrip("b")) // 8
        index = self._bytes(step.operands[1], active, size, len(names))
        for number, name in enumerate(names):
            value = self.registers.get(name, self._all(0)).copy()
            raw = np.zeros((len(index), 8), np.uint8)
            raw[:, :size] = self.memory.bytes[index[:, number * size : (number + 1) * size]]
            value[active] = raw.view(np.uint64)[:, 0]
            self.registers[name] = value

    def _store(self, step: Step, active: NDArray[np.bool_]) -> None:
        names, size = _names(step.operands[1]), int(step.name[-2:].lstrip("b")) // 8
        index = self._bytes(step.operands[0], active, size, len(names))
        if bool(self.memory.written[index].any()) or len(np.unique(index)) < index.size:
            raise PtxError("a byte is written twice")
        self.memory.written[index] = True
        for number, name in enumerate(names):
            raw = self._value(name)[active].view(np.uint8).reshape(-1, 8)[:, :size]
            self.memory.bytes[index[:, number * size : (number + 1) * size]] = raw

    def _bytes(
        self, text: str, active: NDArray[np.bool_], size: int, count: int
    ) -> NDArray[np.int64]:
        program_steps = _ADDRESS.fullmatch(text)
        if program_steps is None:
            raise PtxError(f"not an address: {text}")
        address = self._value(program_steps[1])[active].view(np.int64) + int(program_steps[2] or 0)
        return self.memory.at(address, size, count)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _compute(name: str, values: Sequence[Wide]) -> Wide:
    if name in _WIDE:
        return _WIDE[name](*values)
    if name not in INSTRUCTIONS:
        raise PtxError(f"unknown instruction {name}")
    words = [np.ascontiguousarray((value & _LOW).astype(np.uint32)) for value in values]
    return INSTRUCTIONS[name](*words).astype(np.uint64)


def _signed(value: Wide) -> NDArray[np.int64]:
    """The low 32 bits as a signed number."""
    return (value & _LOW).astype(np.uint32).view(np.int32).astype(np.int64)


def _unsigned(value: Wide) -> Wide:
    return value & _LOW


_COMPARISONS: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "setp.lt.s64": np.less,
    "setp.gt.s64": np.greater,
    "setp.ge.s64": np.greater_equal,
    "setp.le.s64": np.less_equal,
}


def _field(value: Wide, start: Wide, length: Wide) -> Wide:
    """`length` bits of the low 32, from bit `start` on."""
    return (_unsigned(value) >> start) & ((np.uint64(1) << length) - np.uint64(1))


_WIDE: dict[str, Callable[..., Wide]] = {
    "bfe.u32": _field,
    "and.b64": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "or.b64": np.bitwise_or,
    "shl.b64": np.left_shift,
    "shr.u16": np.right_shift,
    "shr.u64": np.right_shift,
    "shr.s64": lambda a, b: (a.view(np.int64) >> b.astype(np.int64)).view(np.uint64),
    "shr.s32": lambda a, b: _unsigned((_signed(a) >> b.astype(np.int64)).view(np.uint64)),
    "add.s32": lambda a, b: _unsigned(a + b),
    "sub.s32": lambda a, b: _unsigned(a - b),
    "mul.lo.s32": lambda a, b: _unsigned(a * b),
    "add.s64": np.add,
    "sub.s64": np.subtract,
    "mul.lo.s64": np.multiply,
    "mad.lo.s64": lambda a, b, c: a * b + c,
    "mul.wide.s32": lambda a, b: (_signed(a) * _signed(b)).view(np.uint64),
    "mul.wide.u32": lambda a, b: _unsigned(a) * _unsigned(b),
    "mad.wide.s32": lambda a, b, c: (_signed(a) * _signed(b)).view(np.uint64) + c,
    "mad.wide.u32": lambda a, b, c: _unsigned(a) * _unsigned(b) + c,
    "cvt.u64.u32": _unsigned,
    "cvt.u32.u64": _unsigned,
    "cvt.u32.u16": _unsigned,
    "cvt.s64.s32": lambda a: _signed(a).view(np.uint64),
}
