"""What `bench.compile.report` compiles: one case per kernel and configuration.

A module of this package defines `compile_cases() -> list[CompileCase]`; the report finds every
module here by itself, so that a new kernel file adds a module and edits nothing. A case names a
Triton kernel, the types of its arguments and its constexprs, as a launch would fix them:

    CompileCase(
        kernel=rms_norm_kernel,
        name="rms_norm",                        # the kernel's name in the report
        config="bf16 width 4096",               # tells this case from others of the same name
        signature={"x": "*bf16", "rows": "i32", "eps": "fp32"},
        constexprs={"BLOCK": 4096},
        num_warps=8,
        elements=4096,                          # elements of one program; 0: do not count
        checked=True,                           # part of `--check`, for sm_80, 90 and 120
    )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
BF16_ARCHITECTURES = ARCHITECTURES[1:]


def architectures_of(dtype: str) -> tuple[int, ...]:
    """Those on which a kernel of `dtype` can run."""
    return BF16_ARCHITECTURES if dtype == "bf16" else ARCHITECTURES


@dataclass(frozen=True, eq=False)
class CompileCase:
    """One kernel in one configuration, for the architectures on which it can run.

    `signature` gives the Triton type of every argument that is not a constexpr, `constexprs` the
    value of every other. Pointers, and integers outside `unaligned`, count as multiples of 16, as
    they are for the sizes of real models. `elements` is how many elements one program handles, or
    for a matmul how many elements of the left operand one iteration of its main loop handles;
    instructions per element and thread must not exceed `limits[architecture]`, where there is one.
    A matmul must use tensor cores, copy asynchronously in its main loop on sm_80 and later, and
    with `left_in_registers` feed the left operand of wgmma from registers on sm_90.
    """

    kernel: Any
    name: str
    config: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    elements: int = 0
    limits: Mapping[int, float] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    architectures: tuple[int, ...] = BF16_ARCHITECTURES
    is_matmul: bool = False
    left_in_registers: bool = False
    checked: bool = False


def where_one(case: CompileCase, argument: str) -> CompileCase:
    """`case` for the calls in which an integer argument is 1, which a launch makes a constexpr."""
    return replace(
        case,
        config=f"{case.config} {argument} 1",
        signature={name: kind for name, kind in case.signature.items() if name != argument},
        constexprs={**case.constexprs, argument: 1},
        limits={},
        unaligned=case.unaligned - {argument},
    )
