"""The gated delta rule's kernels for K = V = 128."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.compile.cases import BF16_ARCHITECTURES, CompileCase
from kernels.delta_net import backward_intra_triton as intra
from kernels.delta_net import backward_triton as backward
from kernels.delta_net import forward_triton as forward
from kernels.delta_net.tiles import Tile, tile

SIZE = 128
DTYPES = ("bf16", "fp16")
KERNELS = {
    "inverse": forward.inverse_kernel,
    "scan": forward.scan_kernel,
    "output": forward.output_kernel,
    "writes_backward": backward.writes_backward_kernel,
    "reverse_scan": backward.reverse_scan_kernel,
    "pairs": intra.pairs_kernel,
    "query": intra.query_kernel,
    "key": intra.key_kernel,
}
_INT32 = ("starts", "ends", "bounds", "first")
_FP32 = ("g", "beta", "q_rstd", "k_rstd", "initial", "final", "d_final", "d_initial", "dg", "dbeta")


def compile_cases() -> list[CompileCase]:
    return [case for dtype in DTYPES for case in (*_tiled(dtype), _unit_backward(dtype))]


def _type(name: str, dtype: str) -> str:
    """The Triton type of an argument, which its name tells."""
    if name in _INT32:
        return "*i32"
    if name in _FP32:
        return "*fp32"
    if name in ("tokens", "heads", "group") or name.endswith(("_row", "_head")):
        return "i32"
    return "fp32" if name == "scale" else f"*{dtype}"


def _signature(kernel: Any, dtype: str) -> dict[str, str]:
    return {name: _type(name, dtype) for name in kernel.arg_names if not name.isupper()}


def _tiled(dtype: str) -> Iterator[CompileCase]:
    for name, kernel in KERNELS.items():
        users: dict[Tile, tuple[int, ...]] = {}
        for arch in BF16_ARCHITECTURES:
            shape = tile(name, arch, SIZE, SIZE)
            users[shape] = (*users.get(shape, ()), arch)
        for shape, architectures in users.items():
            values = {
                "KEY": SIZE,
                "VALUE": SIZE,
                "BLOCK_K": shape.keys,
                "BLOCK_V": shape.values,
                "INITIAL": True,
                "FINAL": True,
                "PRECISION": forward.PRECISION,
            }
            yield CompileCase(
                kernel=kernel,
                name=f"gated_delta_{name}",
                config=f"{dtype} {shape.keys} x {shape.values} warps {shape.warps}",
                signature=_signature(kernel, dtype),
                constexprs={key: values[key] for key in kernel.arg_names if key.isupper()},
                num_warps=shape.warps,
                num_stages=shape.stages,
                unaligned=frozenset(("tokens", "group")),
                architectures=architectures,
                checked=dtype == "bf16",
            )


def _unit_backward(dtype: str) -> CompileCase:
    return CompileCase(
        kernel=intra.unit_backward_kernel,
        name="gated_delta_unit_backward",
        config=dtype,
        signature=_signature(intra.unit_backward_kernel, dtype) | {"rstd": "*fp32"},
        constexprs={"KEY": SIZE, "BLOCK_K": SIZE, "ROWS": intra.UNIT_ROWS},
        elements=SIZE * intra.UNIT_ROWS,
        unaligned=frozenset(("tokens", "group")),
        architectures=BF16_ARCHITECTURES,
        checked=dtype == "bf16",
    )
