"""Find two faults in Triton's intermediate code that no small test shows.

`tl.inline_asm_elementwise` with pack=n hands n elements of a thread to one execution. Which ones
depends on the layout that the compiler chose. A sequence that reads one scale for all of them is
right only if they are neighbours in a row.

An offset computed from a 32-bit program id wraps in a tensor of more than 2^31 elements. So a
program id is widened to 64 bits before anything is multiplied by it.
"""

from __future__ import annotations

import re

_LAYOUT = re.compile(r"^(#\w+) = (#ttg\.\S.*)$", re.MULTILINE)
_INLINE = re.compile(
    r"elementwise_inline_asm .*packed_element = (\d+).*?: "
    r"tensor<[\dx]+x\w+, (#ttg\.\w+<\{.*?\}>|#\w+)>"
)
_ASSIGNMENT = re.compile(r"\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)$")
_NUMBERS = r"\[([\d, ]+)\]"


def packs_across_rows(ttgir: str) -> list[str]:
    """The layouts in which a packed inline sequence may get elements of different rows."""
    layouts = dict(_LAYOUT.findall(ttgir))
    packed = ((int(pack), layouts.get(name, name)) for pack, name in _INLINE.findall(ttgir))
    return sorted({layout for pack, layout in packed if pack > 1 and _along_row(layout) < pack})


def narrow_products(ttir: str) -> list[str]:
    """Instructions that multiply a 32-bit value derived from a program id."""
    narrow: set[str] = set()
    products = []
    for line in ttir.splitlines():
        match = _ASSIGNMENT.match(line)
        if match is None:
            continue
        results, operation, rest = match.groups()
        inputs = set(re.findall(r"%[\w#]+", rest.split(" : ")[0]))
        if operation == "tt.get_program_id":
            narrow.add(results)
        elif inputs & narrow and re.search(r"\bi32|xi32>", rest.split(" to ")[-1]):
            if operation in ("arith.muli", "arith.shli"):
                products.append(line.strip().split(" loc(")[0])
            narrow.add(results)
    return products


def _along_row(layout: str) -> int:
    """How many elements of a thread are neighbours in the last dimension, as far as is known."""
    if layout.startswith("#ttg.blocked"):
        order = _numbers("order", layout)
        return _numbers("sizePerThread", layout)[-1] if order[0] == len(order) - 1 else 1
    if layout.startswith("#ttg.linear"):
        return _first_registers_along_row(layout)
    left_operand = re.search(r"dot_op<\{opIdx = 0,.*kWidth = (\d+)", layout)
    return int(left_operand[1]) if left_operand else 1


def _first_registers_along_row(layout: str) -> int:
    """Of a linear layout: a thread's registers 0, 1, 2, ... that lie side by side in a row.

    Register 2^i lies at the sum of the bases before it: the i-th basis must be 2^i columns on.
    """
    match = re.search(r"register = \[(\[.*?\])\]", layout)
    bases = [] if match is None else re.findall(_NUMBERS, match[1])
    neighbours = 1
    for basis in bases:
        *rows, column = (int(number) for number in basis.split(","))
        if any(rows) or column != neighbours:
            break
        neighbours *= 2
    return neighbours


def _numbers(name: str, layout: str) -> list[int]:
    match = re.search(rf"{name} = {_NUMBERS}", layout)
    if match is None:
        raise ValueError(f"a blocked layout without {name}: {layout}")
    return [int(number) for number in match[1].split(",")]
