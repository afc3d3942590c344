"""The 8-bit AdamW step: gradient norm, preparation and update."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import triton.language as tl

from bench.compile.cases import ARCHITECTURES, CompileCase, architectures_of
from kernels.adamw8bit import fused_triton as adamw8bit_flat
from kernels.adamw8bit.fused_triton import NUM_WARPS, WORK_ROWS

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


def compile_cases() -> list[CompileCase]:
    return [*_norm(), _prepare(), *_update()]


def _norm() -> Iterator[CompileCase]:
    for dtype in DTYPES:
        yield CompileCase(
            kernel=adamw8bit_flat.grad_norm_kernel,
            name="adamw_grad_norm",
            config=dtype,
            signature={
                "segments": "*i64",
                "work": "*i32",
                "partials": "*fp64",
                "items": "i32",
            },
            constexprs={"KIND": 0, "GRAD": DTYPES[dtype], "ALIGNED": True, "ROWS": WORK_ROWS},
            num_warps=NUM_WARPS,
            elements=WORK_ROWS * 256,
            unaligned=frozenset({"items"}),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )


def _prepare() -> CompileCase:
    return CompileCase(
        kernel=adamw8bit_flat.prepare_kernel,
        name="adamw_prepare",
        config="",
        signature={
            "segments": "*i64",
            "groups": "*fp64",
            "partials": "*fp64",
            "grad_scale": "*fp32",
            "steps": "*i64",
            "skipped": "*i64",
            "factors": "*fp32",
            "outcome": "*fp32",
            "segment_count": "i32",
            "partial_count": "i32",
            "max_norm": "fp32",
        },
        constexprs={"BLOCK": adamw8bit_flat.PREPARE_BLOCK},
        unaligned=frozenset({"segment_count", "partial_count"}),
        architectures=ARCHITECTURES,
        checked=True,
    )


def _update() -> Iterator[CompileCase]:
    variants = {"plain": (False, False), "master": (True, False), "stochastic": (False, True)}
    for dtype, quantized, nearest in product(DTYPES, (True, False), (True, False)):
        for variant, (master, stochastic) in variants.items():
            if (variant == "stochastic" and dtype != "bf16") or (
                variant == "master" and dtype == "fp32"
            ):
                continue
            if not quantized and not nearest:
                continue
            states = "*u8" if quantized else "*fp32"
            yield CompileCase(
                kernel=adamw8bit_flat.adamw_kernel,
                name="adamw",
                config=f"{dtype} {variant} {'8-bit' if quantized else 'fp32'} "
                f"{'nearest' if nearest else 'grid'}",
                signature={
                    "segments": "*i64",
                    "work": "*i32",
                    "factors": "*fp32",
                    "outcome": "*fp32",
                    "steps": "*i64",
                    "m_rows": states,
                    "v_rows": states,
                    **dict.fromkeys(("m_absmax", "v_absmax", "m_map", "v_map"), "*fp32"),
                    **dict.fromkeys(("m_cells", "v_cells"), "*u8"),
                    **dict.fromkeys(("m_thresholds", "v_thresholds"), "*fp32"),
                    "seed": "i64",
                },
                constexprs={
                    "KIND": 0,
                    "PARAM": DTYPES[dtype],
                    "GRAD": DTYPES[dtype],
                    "MASTER": master,
                    "QUANTIZED": quantized,
                    "NEAREST": nearest,
                    "STOCHASTIC": stochastic,
                    "ALIGNED": True,
                    "ROWS": WORK_ROWS,
                },
                num_warps=NUM_WARPS,
                elements=WORK_ROWS * 256,
                unaligned=frozenset({"seed"}),
                architectures=architectures_of(dtype),
                checked=quantized and nearest and (dtype, variant) == ("fp32", "plain"),
            )
