"""Grouped products of mixtures of experts, from sm_80 on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.compile.cases import BF16_ARCHITECTURES, CompileCase, where_one
from bench.compile.cases.nf4 import MATMUL_LIMITS
from kernels.moe import grouped_matmul_triton as grouped
from kernels.runtime.triton_support import tl

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
FLAGS = ((False, False), (True, False), (False, True))
"""(rows gathered, result added to)."""
_POINTERS = {"gather": "*i64", "offsets": "*i32", "tile_expert": "*i32", "tile_row": "*i32"}
_SIZES = ("experts", "width", "depth", "ldx", "ldo")


def compile_cases() -> list[CompileCase]:
    quantized = list(_nf4())
    one_expert = [where_one(case, "experts") for case in quantized if case.checked]
    return [*_dense(), *quantized, *one_expert, *_outer()]


def _config(dtype: str, *flags: tuple[bool, str]) -> str:
    return " ".join([dtype, *(name for on, name in flags if on)])


def _dense() -> Iterator[CompileCase]:
    for dtype, (gather, accumulate) in product(DTYPES, FLAGS):
        yield CompileCase(
            kernel=grouped.dense_kernel,
            name="grouped_dense",
            config=_config(dtype, (gather, "gathered"), (accumulate, "added")),
            signature={
                **dict.fromkeys(("x", "weight", "out"), f"*{dtype}"),
                **_POINTERS,
                **dict.fromkeys((*_SIZES, "w_expert", "w_depth"), "i32"),
                "scale": "fp32",
            },
            constexprs={
                "w_width": 1,
                "GATHER": gather,
                "ACCUMULATE": accumulate,
                "BLOCK_M": grouped.BLOCK_M,
                "BLOCK_N": grouped.BLOCK_N,
                "BLOCK_K": grouped.BLOCK_K,
            },
            unaligned=frozenset(("experts",)),
            architectures=BF16_ARCHITECTURES,
            is_matmul=True,
            checked=dtype == "bf16" and gather,
        )


def _nf4() -> Iterator[CompileCase]:
    for dtype, (gather, accumulate), nested, transposed in product(
        DTYPES, FLAGS, (True, False), (False, True)
    ):
        absmax = "*u8" if nested else "*fp32"
        block = {"BLOCK_K": grouped.BLOCK_K} if transposed else {"BLOCK_N": grouped.BLOCK_N}
        yield CompileCase(
            kernel=grouped.nf4_transposed_kernel if transposed else grouped.nf4_kernel,
            name="grouped_nf4_transposed" if transposed else "grouped_nf4",
            config=_config(
                dtype,
                (nested, "nested"),
                (not nested, "plain"),
                (gather, "gathered"),
                (accumulate, "added"),
            ),
            signature={
                "x": f"*{dtype}",
                "codes": "*i16",
                "absmax": absmax,
                **dict.fromkeys(("value_map", "nested", "offset"), "*fp32"),
                "out": f"*{dtype}",
                **_POINTERS,
                **dict.fromkeys(_SIZES, "i32"),
                "scale": "fp32",
            },
            constexprs={
                "GATHER": gather,
                "ACCUMULATE": accumulate,
                "NESTED": nested,
                "NESTED_SHIFT": 8,
                "BLOCK_M": grouped.BLOCK_M,
                "DTYPE": DTYPES[dtype],
                "PTX": True,
                **block,
            },
            unaligned=frozenset(("experts",)),
            architectures=BF16_ARCHITECTURES,
            elements=64 * (grouped.BLOCK_K if transposed else grouped.BLOCK_N),
            limits=MATMUL_LIMITS,
            is_matmul=True,
            left_in_registers=not transposed,
            checked=dtype == "bf16" and nested and gather,
        )


def _outer() -> Iterator[CompileCase]:
    for dtype, gather in product(DTYPES, (False, True)):
        yield CompileCase(
            kernel=grouped.outer_kernel,
            name="grouped_outer",
            config=_config(dtype, (gather, "gathered")),
            signature={
                **dict.fromkeys(("a", "b", "out"), f"*{dtype}"),
                **dict.fromkeys(("a_gather", "b_gather"), "*i64"),
                "offsets": "*i32",
                **dict.fromkeys(("height", "width", "lda", "ldb", "ldo"), "i32"),
                "scale": "fp32",
            },
            constexprs={
                "A_GATHER": gather,
                "B_GATHER": gather,
                "BLOCK_M": grouped.BLOCK_K,
                "BLOCK_P": 64,
                "BLOCK_Q": 64,
            },
            architectures=BF16_ARCHITECTURES,
            checked=dtype == "bf16" and gather,
        )
