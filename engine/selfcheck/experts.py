"""Check torch's grouped product, which experts take on some GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.selfcheck.accuracy import Verdict, compare, poison
from engine.selfcheck.kernels import judge
from engine.selfcheck.options import CheckOptions, Finding, failed, not_run
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_library import ExpertProduct, called_on, library_matmul, solves
from kernels.moe.grouped_matmul import expert_weight, planar_experts
from kernels.nf4 import quantize
from kernels.nf4.planar import PlanarNF4Weight

_SMALL_ROWS, _REAL_ROWS = (3, 0, 70, 1, 0, 64), (700, 0, 1300, 1, 0, 2095)
_SMALL, _REAL = (48, 128), (768, 2048)
"""Rows of each expert, of which some have none, and the shape of their weights."""


def check_grouped_library(options: CheckOptions) -> Finding:
    """Products by decoded experts in both directions, gathered, scaled and added.

    In the interpreter torch's function for CPUs stands in for that for GPUs.
    """
    device = options.device
    if device.type == "cuda" and not called_on(device):
        return not_run("torch._grouped_mm is called on sm_90 alone; experts are decoded on the way")
    answer = solves(device)
    if answer != "ok":
        return failed(f"torch._grouped_mm: {answer}")
    sizes, shape = (_SMALL_ROWS, _SMALL) if options.small else (_REAL_ROWS, _REAL)
    dense = torch.randn(len(sizes), *shape, device=device).bfloat16()
    weight = planar_experts(quantize(dense))
    forms = [(way, added) for way in (False, True) for added in (False, True)]
    finding = judge(
        {
            f"{'W^T x' if way else 'W x'}{', gathered and added' if added else ''}": _verdict(
                weight, sizes, way, added, device
            )
            for way, added in forms
        }
    )
    if device.type == "cuda" or not finding["passed"]:
        return finding
    return finding | {"detail": f"{finding['detail']}; torch's function for CPUs stands in"}


def _verdict(
    weight: PlanarNF4Weight,
    sizes: tuple[int, ...],
    transpose: bool,
    added: bool,
    device: torch.device,
) -> Verdict:
    count, height, width = (int(size) for size in weight.shape)
    depth, columns = (height, width) if transpose else (width, height)
    ends = torch.tensor((0, *sizes), device=device).cumsum(0)
    rows = sum(sizes)
    x = torch.randn(rows, depth, device=device).bfloat16()
    index = torch.randint(0, rows, (rows,), device=device) if added else None
    read = x if index is None else x.index_select(0, index)
    start = torch.randn(rows, columns, device=device).bfloat16()
    scale = 0.5 if added else 1.0

    def expected(dtype: torch.dtype) -> Tensor:
        parts = []
        for expert, part in zip(range(count), read.split(sizes), strict=True):
            dense = expert_weight(weight, expert, torch.bfloat16).to(dtype)
            parts.append(part.to(dtype) @ (dense if transpose else dense.T))
        product = torch.cat(parts)
        return start.to(dtype) + scale * product if added else product

    plain, truth = expected(torch.bfloat16), expected(torch.float64)
    poison(device)
    out = start.clone() if added else torch.empty_like(start)
    given = Gathered(x, index), weight, ends.to(torch.int32), out
    library_matmul(ExpertProduct(*given, transpose, added, scale))
    error = compare(out, plain, truth, exact=False)
    return {"outputs": {"out": error}, "passed": error["passed"]}
