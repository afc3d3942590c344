"""Read machine code: a kernel's registers, memory and instruction counts.

`cuobjdump` ships inside Triton's package, so no CUDA toolkit and no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH = re.compile(r"^BRA\S*\s.*?(0x[0-9a-f]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_LEFT_IN_REGISTERS = re.compile(r"^HGMMA\S*\s+R\d+,\s*R\d+")

TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "QGMMA", "UTCHMMA", "UTCOMMA", "UTCQMMA")
ASYNC_COPY = ("LDGSTS", "UBLKCP", "UTMALDG")
LOCAL_MEMORY = ("LDL", "STL")
_NOT_COUNTED = ("NOP", "EXIT", "BRA")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    """Without its predicate."""

    @property
    def name(self) -> str:
        """The operation without its modifiers: "LDG" for "LDG.E.128"."""
        return self.text.split()[0].split(".")[0]


@dataclass(frozen=True)
class Disassembly:
    registers: int
    stack: int
    """Bytes of local memory per thread: spilled registers and arrays."""
    instructions: tuple[Instruction, ...]

    def count(self, names: tuple[str, ...]) -> int:
        return sum(i.name in names for i in self.instructions)

    def main_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop around a tensor-core instruction; empty where there is none."""
        best: tuple[Instruction, ...] = ()
        for branch in self.instructions:
            target = _BRANCH.match(branch.text)
            if target is None or int(target[1], 16) >= branch.address:
                continue
            start = int(target[1], 16)
            body = tuple(i for i in self.instructions if start <= i.address <= branch.address)
            has_product = any(i.name in TENSOR_CORE for i in body)
            if has_product and (not best or len(body) < len(best)):
                best = body
        return best


def issued(instructions: tuple[Instruction, ...]) -> int:
    """How many instructions do work: padding, and the branches and exits, left out."""
    return sum(i.name not in _NOT_COUNTED for i in instructions)


def left_in_registers(instructions: tuple[Instruction, ...]) -> bool:
    """Whether every wgmma among them reads its left operand from registers, and there is one."""
    products = [i.text for i in instructions if i.name == "HGMMA"]
    return bool(products) and all(_LEFT_IN_REGISTERS.match(text) for text in products)


def disassemble(cubin: bytes, cuobjdump: Path) -> Disassembly:
    """Take a compiled kernel apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(option: str) -> str:
            command = [str(cuobjdump), option, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        code, usage = run("-sass"), _USAGE.search(run("-res-usage"))
    if usage is None:
        raise ValueError("cuobjdump reports no resource usage")
    matches = (match for line in code.splitlines() if (match := _LINE.match(line)))
    instructions = tuple(Instruction(int(m[1], 16), _PREDICATE.sub("", m[2])) for m in matches)
    return Disassembly(int(usage[1]), int(usage[2]) + int(usage[3]), instructions)
