"""Adapters of a group joined, and their gradients taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.compile.cases import CompileCase, architectures_of
from kernels.linear import adapters_triton
from kernels.linear.projection import ALIGNED

_NUMBERS = [f"{name}{index}" for name, index in product(("rank", "first", "height"), range(3))] + [
    "second",
    "third",
    "rows",
    "columns",
    "a_row",
    "b_row",
]
_PAIRS = [f"{name}{index}" for name, index in product("ab", range(3))]


def compile_cases() -> list[CompileCase]:
    return [*_cases("pack", False), *_cases("unpack", False), *_cases("pack", True)]


def _cases(name: str, odd: bool) -> Iterator[CompileCase]:
    """With `odd` ranks, whose rows begin anywhere; joint matrices are aligned for every rank."""
    kernel = getattr(adapters_triton, f"{name}_kernel")
    for dtype in ("bf16", "fp16"):
        yield CompileCase(
            kernel=kernel,
            name=f"adapters_{name}",
            config=f"{dtype}{' odd ranks' if odd else ''}",
            signature={
                **dict.fromkeys(_PAIRS, "*fp32"),
                **dict.fromkeys(("a_ptr", "b_ptr"), f"*{dtype}"),
                **dict.fromkeys((f"scale{index}" for index in range(3)), "fp32"),
                **dict.fromkeys(_NUMBERS, "i32"),
            },
            constexprs={
                "ROWS": adapters_triton.ROWS,
                "WIDTH": adapters_triton.WIDTH,
                "BLOCK": ALIGNED,
            },
            num_warps=adapters_triton.WARPS,
            unaligned=frozenset(
                ["second", "third", *(f"rank{index}" for index in range(3))] if odd else
                ["second", "third"]
            ),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )  # fmt: skip
