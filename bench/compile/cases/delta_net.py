"""Convolution and gated norm of Gated DeltaNet layers, at real sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.compile.cases import CompileCase, architectures_of
from kernels.delta_net import causal_conv1d_triton, gated_rms_norm_triton

DTYPES = ("bf16", "fp16", "fp32")
CHANNELS = 8192
HEADS = 32
WIDTHS = (128, 256, 1024)
_INT32 = ("document_ptr", "position_ptr")
_FP32 = ("rstd_ptr", "partial_ptr")


def compile_cases() -> list[CompileCase]:
    return [*_convolution(), *_norm()]


def _signature(kernel: Any, dtype: str) -> dict[str, str]:
    types = {**dict.fromkeys(_INT32, "*i32"), **dict.fromkeys(_FP32, "*fp32"), "eps": "fp32"}
    return {
        name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if not name.isupper()
    }


def _case(
    kernel: Any,
    dtype: str,
    config: str,
    constexprs: dict[str, object],
    elements: int,
    warps: int,
    unaligned: tuple[str, ...] = (),
    *,
    checked: bool,
) -> CompileCase:
    """A case named after its kernel; only in bf16 may it be a checked one."""
    return CompileCase(
        kernel=kernel,
        name=kernel.__name__.removesuffix("_kernel"),
        config=f"{dtype}{config}",
        signature=_signature(kernel, dtype),
        constexprs=constexprs,
        num_warps=warps,
        elements=elements,
        unaligned=frozenset(unaligned),
        architectures=architectures_of(dtype),
        checked=checked and dtype == "bf16",
    )


def _convolution() -> Iterator[CompileCase]:
    forward = causal_conv1d_triton.causal_conv1d_forward_kernel
    backward = causal_conv1d_triton.causal_conv1d_backward_kernel
    for dtype, flag in product(DTYPES, (False, True)):
        block, warps = causal_conv1d_triton.tile(CHANNELS)
        values: dict[str, object] = {"TAPS": 4, "STATE": flag, "BLOCK": block}
        config, sizes = " state" * flag, ("tokens", "depth")
        yield _case(forward, dtype, config, values, block, warps, sizes, checked=not flag)
        block, warps = causal_conv1d_triton.tile(CHANNELS, flag)
        values = {"TAPS": 4, "DWEIGHT": flag, "BLOCK": block}
        config, sizes = " dweight" * flag, ("tokens", "run")
        yield _case(backward, dtype, config, values, block, warps, sizes, checked=not flag)


def _norm() -> Iterator[CompileCase]:
    forward = gated_rms_norm_triton.gated_rms_norm_forward_kernel
    backward = gated_rms_norm_triton.gated_rms_norm_backward_kernel
    for width, dtype in product(WIDTHS, DTYPES):
        rows, block, warps = gated_rms_norm_triton.tile(width, HEADS)
        values: dict[str, object] = {"ROWS": rows, "BLOCK": block}
        config, checked = f" width {width}", width == WIDTHS[0]
        yield _case(forward, dtype, config, values, rows * block, warps, checked=checked)
        for dweight in (False, True):
            yield _case(
                backward,
                dtype,
                config + " dweight" * dweight,
                {"DWEIGHT": dweight, **values},
                rows * block,
                warps,
                ("tiles",),
                checked=checked and not dweight,
            )
