"""RMSNorm, RoPE, SwiGLU, cross-entropy and dropout at the widths of real models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.compile.cases import CompileCase, architectures_of
from kernels.elementwise import dropout, rms_norm_triton, rope, swiglu
from kernels.loss import cross_entropy

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = tuple(ITEMSIZES)
NORM_WIDTHS = (128, 1024, 4096, 8192, 16384)
HEADS = ((32, 64), (32, 128), (48, 96), (16, 256))
"""Heads and head dimension."""


def compile_cases() -> list[CompileCase]:
    norm = [*_norm_forward(), *_norm_backward(), *_norm_dweight()]
    return [*norm, *_rope(), *_swiglu(), *_cross_entropy(), *_dropout()]


def _strides(*names: str) -> dict[str, str]:
    return {f"{name}_{unit}": "i32" for name, unit in product(names, ("outer", "inner"))}


def _groups(width: int) -> int:
    """Norms of heads read 32 of them in each token, the others plain rows."""
    return 32 if width <= 256 else 4096


def _norm_forward() -> Iterator[CompileCase]:
    for width, dtype, add in product(NORM_WIDTHS, DTYPES, (False, True)):
        rows, block, warps = rms_norm_triton.tile(width, _groups(width), ITEMSIZES[dtype])
        tensors = ("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr")
        yield CompileCase(
            kernel=rms_norm_triton.rms_norm_forward_kernel,
            name="rms_norm_forward",
            config=f"{dtype} width {width}{' add' if add else ''}",
            signature={
                **dict.fromkeys(tensors, f"*{dtype}"),
                "rstd_ptr": "*fp32",
                "groups": "i32",
                "width": "i32",
                "eps": "fp32",
                **_strides("x", "r", "y", "sum"),
            },
            constexprs={
                "GROUPED": width <= 256,
                "ADD": add,
                "ZERO_CENTERED": False,
                "ROWS": rows,
                "BLOCK": block,
            },
            num_warps=warps,
            elements=rows * block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and width == 4096 and add,
        )


def _norm_backward() -> Iterator[CompileCase]:
    for width, dtype, dweight in product(NORM_WIDTHS, DTYPES, (False, True)):
        if dweight and width > rms_norm_triton.FUSED_DWEIGHT_WIDTH:
            continue
        rows, block, warps = rms_norm_triton.tile(
            width, _groups(width), ITEMSIZES[dtype], backward=True, dweight=dweight
        )
        tensors = ("dy_ptr", "x_ptr", "weight_ptr", "dresidual_ptr", "dx_ptr")
        yield CompileCase(
            kernel=rms_norm_triton.rms_norm_backward_kernel,
            name="rms_norm_backward",
            config=f"{dtype} width {width}{' dweight' if dweight else ''}",
            signature={
                **dict.fromkeys(tensors, f"*{dtype}"),
                "rstd_ptr": "*fp32",
                "partial_ptr": "*fp32",
                "steps": "i32",
                "groups": "i32",
                "width": "i32",
                **_strides("dy", "x", "dx", "r"),
            },
            constexprs={
                "GROUPED": width <= 256,
                "ADD": True,
                "ZERO_CENTERED": False,
                "DWEIGHT": dweight,
                "ROWS": rows,
                "BLOCK": block,
            },
            num_warps=warps,
            elements=rows * block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and width == 4096,
        )


def _norm_dweight() -> Iterator[CompileCase]:
    rows, block, warps = rms_norm_triton.dweight_tile()
    for dtype in DTYPES:
        yield CompileCase(
            kernel=rms_norm_triton.rms_norm_dweight_kernel,
            name="rms_norm_dweight",
            config=dtype,
            signature={
                **dict.fromkeys(("dy_ptr", "x_ptr"), f"*{dtype}"),
                **dict.fromkeys(("rstd_ptr", "partial_ptr"), "*fp32"),
                **dict.fromkeys(("rows", "width", "dy_row", "x_row"), "i32"),
            },
            constexprs={"ROWS": rows, "BLOCK": block},
            num_warps=warps,
            elements=rows * block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )


def _rope() -> Iterator[CompileCase]:
    sizes = ("q_heads", "k_heads", "half", "cos_token", "sin_token")
    strides = [
        f"{name}_{unit}" for name, unit in product(("q", "k", "q_out", "k_out"), ("token", "head"))
    ]
    for (heads, dim), dtype in product(HEADS, DTYPES):
        tile_heads, block, warps = rope.tile(dim // 2, heads)
        yield CompileCase(
            kernel=rope.rope_kernel,
            name="rope",
            config=f"{dtype} head {dim}",
            signature={
                **dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}"),
                **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                **dict.fromkeys((*sizes, *strides), "i32"),
            },
            constexprs={"INVERSE": False, "HEADS": tile_heads, "BLOCK": block},
            num_warps=warps,
            elements=2 * tile_heads * block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and dim == 128,
        )


def _swiglu() -> Iterator[CompileCase]:
    block, warps = swiglu.tile(14336)
    for dtype in DTYPES:
        yield CompileCase(
            kernel=swiglu.swiglu_forward_kernel,
            name="swiglu_forward",
            config=dtype,
            signature={
                **dict.fromkeys(("gate_ptr", "up_ptr", "h_ptr"), f"*{dtype}"),
                **dict.fromkeys(("width", "gate_row", "up_row", "h_row"), "i32"),
            },
            constexprs={"BLOCK": block},
            num_warps=warps,
            elements=block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )
    for dtype, keep_h in product(DTYPES, (False, True)):
        yield CompileCase(
            kernel=swiglu.swiglu_backward_kernel,
            name="swiglu_backward",
            config=f"{dtype}{' keep_h' if keep_h else ''}",
            signature={
                **dict.fromkeys(("dh_ptr", "gate_ptr", "up_ptr"), f"*{dtype}"),
                **dict.fromkeys(("width", "dh_row", "gate_row", "up_row"), "i32"),
            },
            constexprs={"KEEP_H": keep_h, "BLOCK": block},
            num_warps=warps,
            elements=block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )


def _cross_entropy() -> Iterator[CompileCase]:
    forms = ((True, False), (False, False), (True, True))
    for dtype, (gradient, terms), vocabulary in product(DTYPES, forms, (1000, 128256)):
        block, warps = cross_entropy.tile(vocabulary)
        yield CompileCase(
            kernel=cross_entropy.cross_entropy_kernel,
            name="cross_entropy",
            config=f"{dtype} block {block}{'' if gradient else ' loss only'}"
            f"{' terms' if terms else ''}",
            signature={
                "logits_ptr": f"*{dtype}",
                "targets_ptr": "*i64",
                "losses_ptr": "*fp32",
                "weights_ptr": "*fp32",
                "rows": "i32",
                "vocabulary": "i32",
                "logits_row": "i32",
                "scale": "fp32",
                "smoothing": "fp32",
                "z_loss": "fp32",
            },
            constexprs={"GRADIENT": gradient, "TERMS": terms, "WEIGHTED": terms, "BLOCK": block},
            num_warps=warps,
            elements=block,
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and gradient and block == 4096 and not terms,
        )


def _dropout() -> Iterator[CompileCase]:
    sizes = ("rows", "width", "x_row", "first_row", "site", "threshold")
    for dtype, width in product(DTYPES, (576, 14336)):
        rows, block, warps = dropout.tile(width)
        yield CompileCase(
            kernel=dropout.dropout_kernel,
            name="dropout",
            config=f"{dtype} block {block}",
            signature={
                **dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"),
                "key_ptr": "*i64",
                **dict.fromkeys(sizes, "i32"),
                "scale": "fp32",
            },
            constexprs={"ROWS": rows, "BLOCK": block},
            num_warps=warps,
            elements=8 * rows * block,
            unaligned=frozenset(("key_ptr", "threshold", "first_row", "site", "rows")),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16",
        )
