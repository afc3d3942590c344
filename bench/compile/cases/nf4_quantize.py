"""NF4 quantisation on the device, for every dtype and some block sizes."""

from __future__ import annotations

from itertools import product

from bench.compile.cases import CompileCase, architectures_of
from kernels.nf4.quantize_triton import NUM_WARPS, TILE, quantize_nf4_kernel


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            kernel=quantize_nf4_kernel,
            name="nf4_quantize",
            config=f"{dtype} block {block}",
            signature={
                "w": f"*{dtype}",
                "thresholds": "*fp32",
                "packed": "*u8",
                "absmax": "*fp32",
                "numel": "i64",
            },
            constexprs={"BLOCK": block, "BLOCKS": max(1, TILE // block)},
            num_warps=NUM_WARPS,
            elements=max(TILE, block),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and block == 64,
        )
        for dtype, block in product(("bf16", "fp16", "fp32"), (32, 64, 256, 4096))
    ]
