"""The convolution and the gated norm of Gated DeltaNet layers at the sizes of real models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.compile_cases import ARCHITECTURES, BF16_ARCHITECTURES, CompileCase
from kernels import causal_conv1d_triton, gated_rms_norm_triton

DTYPES = ("bf16", "fp16", "fp32")
CHANNELS = 8192
HEADS = 32
WIDTHS = (128, 256, 1024)
_INT32 = ("document_ptr", "position_ptr")
_FP32 = ("rstd_ptr", "partial_ptr")


def compile_cases() -> list[CompileCase]:
    return [*_convolution(), *_norm()]


def _architectures(dtype: str) -> tuple[int, ...]:
    return BF16_ARCHITECTURES if dtype == "bf16" else ARCHITECTURES


def _signature(kernel: Any, dtype: str) -> dict[str, str]:
    types = {**dict.fromkeys(_INT32, "*i32"), **dict.fromkeys(_FP32, "*fp32"), "eps": "fp32"}
    return {
        name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if not name.isupper()
    }


def _convolution() -> Iterator[CompileCase]:
    block, warps = causal_conv1d_triton.tile(CHANNELS)
    for dtype, state in product(DTYPES, (False, True)):
        kernel = causal_conv1d_triton.causal_conv1d_forward_kernel
        yield CompileCase(
            kernel=kernel,
            name="causal_conv1d_forward",
            config=f"{dtype}{' state' if state else ''}",
            signature=_signature(kernel, dtype),
            constexprs={"TAPS": 4, "STATE": state, "BLOCK": block},
            num_warps=warps,
            elements=block,
            unaligned=frozenset(("tokens", "depth")),
            architectures=_architectures(dtype),
            checked=dtype == "bf16" and not state,
        )
    for dtype, dweight in product(DTYPES, (False, True)):
        block, warps = causal_conv1d_triton.tile(CHANNELS, dweight)
        kernel = causal_conv1d_triton.causal_conv1d_backward_kernel
        yield CompileCase(
            kernel=kernel,
            name="causal_conv1d_backward",
            config=f"{dtype}{' dweight' if dweight else ''}",
            signature=_signature(kernel, dtype),
            constexprs={"TAPS": 4, "DWEIGHT": dweight, "BLOCK": block},
            num_warps=warps,
            elements=block,
            unaligned=frozenset(("tokens", "run")),
            architectures=_architectures(dtype),
            checked=dtype == "bf16" and not dweight,
        )


def _norm() -> Iterator[CompileCase]:
    for width, dtype in product(WIDTHS, DTYPES):
        rows, block, warps = gated_rms_norm_triton.tile(width, HEADS)
        kernel = gated_rms_norm_triton.gated_rms_norm_forward_kernel
        yield CompileCase(
            kernel=kernel,
            name="gated_rms_norm_forward",
            config=f"{dtype} width {width}",
            signature=_signature(kernel, dtype),
            constexprs={"ROWS": rows, "BLOCK": block},
            num_warps=warps,
            elements=rows * block,
            architectures=_architectures(dtype),
            checked=dtype == "bf16" and width == 128,
        )
    for width, dtype, dweight in product(WIDTHS, DTYPES, (False, True)):
        rows, block, warps = gated_rms_norm_triton.tile(width, HEADS)
        kernel = gated_rms_norm_triton.gated_rms_norm_backward_kernel
        yield CompileCase(
            kernel=kernel,
            name="gated_rms_norm_backward",
            config=f"{dtype} width {width}{' dweight' if dweight else ''}",
            signature=_signature(kernel, dtype),
            constexprs={"DWEIGHT": dweight, "ROWS": rows, "BLOCK": block},
            num_warps=warps,
            elements=rows * block,
            unaligned=frozenset(("tiles",)),
            architectures=_architectures(dtype),
            checked=dtype == "bf16" and width == 128 and not dweight,
        )
