"""8-bit rows decoded at the widths of real heads."""

from __future__ import annotations

from bench.compile.cases import CompileCase, architectures_of
from kernels.linear import int8

LIMIT = 12.0
"""Instructions per element. At 3 bytes an element an H200 could issue 18 and wait for memory still,
a 4090 more than 100."""


def compile_cases() -> list[CompileCase]:
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (576, 4096):
            rows, block, warps = int8.tile(width)
            cases.append(
                CompileCase(
                    kernel=int8.dequantize_int8_kernel,
                    name="int8_dequantize",
                    config=f"{dtype} width {width}",
                    signature={
                        "codes_ptr": "*i8",
                        "absmax_ptr": "*fp32",
                        "out_ptr": f"*{dtype}",
                        **dict.fromkeys(("rows", "width", "codes_row", "out_row"), "i32"),
                    },
                    constexprs={"ROWS": rows, "BLOCK": block},
                    num_warps=warps,
                    elements=rows * block,
                    limits=dict.fromkeys(architectures_of(dtype), LIMIT),
                    architectures=architectures_of(dtype),
                    checked=dtype == "bf16" and width == 4096,
                )
            )
    return cases
