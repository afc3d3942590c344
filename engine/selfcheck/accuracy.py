"""The one accuracy rule, on the device itself.

With truth in float64 from the same rounded inputs, for every value and gradient:

    max|ours - truth| <= 2 * max|plain torch in the same dtype - truth| + 1 ulp

The ulp is that of our result's dtype at the largest true value. Before each op the allocator's free
memory is filled with NaN, so that an element which no code writes cannot look right. A decoded
weight and its plain twin must agree to the bit, and so must the codes of a quantised one. The 8-bit
optimiser has no float64 form: its codes on the device are compared with those of its reference on
the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, Tensors
from engine.benchmark.timing import clear
from kernels.nf4 import NF4Weight, quantize
from kernels.nf4.dequantize_triton import nf4_dequantize
from kernels.nf4.planar import PlanarNF4Weight, to_planar
from optim import AdamW8bit

Verdict = dict[str, Any]
"""`outputs` with their errors, and `passed`."""

EXACT = ("nf4_quantize", "nf4_dequantize", "nf4_dequantize_transposed")
_POISON_BYTES = 2 << 30
_CODES_APART = 1e-4
"""Share of codes that may differ: values within an ulp of a rounding boundary."""


def check_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Errors of every output of a case; `passed` says whether all keep the rule."""
    clear(device)
    if case.op == "adamw8bit":
        return check_optimizer(device)
    work = case.make(device)
    poison(device)
    ours = {name: value.detach() for name, value in work.ours(work.copies()).items()}
    plain = work.plain(work.tensors)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in work.tensors.items()}
    truth = plain if case.op in EXACT else work.plain(wide)
    outputs = {
        name: compare(ours[name], plain[name], truth[name], exact=case.op in EXACT)
        for name in truth
    }
    return {"outputs": outputs, "passed": all(entry["passed"] for entry in outputs.values())}


def compare(ours: Tensor, plain: Tensor, truth: Tensor, *, exact: bool) -> dict[str, Any]:
    """The two errors, the ulp, and whether the rule holds. NaN never passes."""
    truth = truth.detach().double()
    error = float((ours.double() - truth).abs().max())
    other = float((plain.detach().double() - truth).abs().max())
    step = ulp(ours.dtype, float(truth.abs().max())) if ours.is_floating_point() else 0.0
    passed = torch.equal(ours, plain) if exact else error <= 2 * other + step
    return {"ours": error, "plain": other, "ulp": step, "passed": bool(passed)}


def ulp(dtype: torch.dtype, value: float) -> float:
    """Distance of neighbouring numbers of `dtype` at `value`."""
    _, exponent = torch.frexp(torch.tensor(value, dtype=torch.float64))
    return float(torch.finfo(dtype).eps * 2.0 ** (int(exponent) - 1))


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator will hand out next."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        count = min(_POISON_BYTES, free // 2) // 4
        for part in (count, 1 << 20, 1 << 16):
            torch.full((part,), float("nan"), device=device)


def check_optimizer(device: torch.device) -> dict[str, Any]:
    """Three steps on the device and on the CPU from the same gradients, rounded alike."""
    generator = torch.Generator().manual_seed(0)
    # The interpreter takes a while for every element; the smallest with 8-bit moments has 4,096.
    small: list[tuple[int, ...]] = [(16, 300), (127,), (70, 71)]
    large: list[tuple[int, ...]] = [(16, 4096), (4096, 16), (1024, 16), (127,), (300, 301)]
    shapes = large if device.type == "cuda" else small
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    mine, mine_params = _optimized(start, grads, device)
    with references():
        reference, reference_params = _optimized(start, grads, torch.device("cpu"))
    apart = _codes_apart(mine, reference)
    change = float((mine_params - reference_params).abs().max())
    return {
        "codes_apart": apart,
        "largest_parameter_difference": change,
        "passed": apart <= _CODES_APART and change <= 1e-5,
    }


def _optimized(
    start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], device: torch.device
) -> tuple[Tensors, Tensor]:
    """The optimizer's state and the parameters after a step for each of `grads`."""
    params = [value.to(device, copy=True).requires_grad_() for value in start]
    optimizer = AdamW8bit(params, lr=1e-3, rounding="nearest")
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.to(device, copy=True)
        optimizer.step()
    state = {name: value.cpu() for name, value in optimizer.state_tensors().items()}
    return state, torch.cat([param.detach().cpu().view(-1) for param in params])


@contextmanager
def references() -> Iterator[None]:
    """Every op takes its torch reference."""
    before = os.environ.get("ENGINE_REFERENCE")
    os.environ["ENGINE_REFERENCE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ENGINE_REFERENCE"]
        else:
            os.environ["ENGINE_REFERENCE"] = before


def check_layouts(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Both orders of NF4 codes, decoded straight and transposed, are table look-ups to the bit."""
    clear(device)
    flat = quantize(torch.randn(rows, columns, device=device).to(dtype))
    stored: dict[str, NF4Weight | PlanarNF4Weight] = {"flat": flat, "planar": to_planar(flat)}
    truth = plain.nf4_weight(flat, dtype)
    poison(device)
    outputs = {}
    for name, weight in stored.items():
        for transposed in (False, True):
            want = truth.T.contiguous() if transposed else truth
            got = nf4_dequantize(weight, dtype, transposed=transposed)
            key = f"{name} transposed" if transposed else name
            outputs[key] = compare(got, want, want, exact=True)
    return {"outputs": outputs, "passed": all(entry["passed"] for entry in outputs.values())}


def _codes_apart(mine: Tensors, reference: Tensors) -> float:
    """Share of 8-bit codes that differ."""
    codes = [name for name, value in reference.items() if value.dtype == torch.uint8]
    differing = sum(int((mine[name] != reference[name]).sum()) for name in codes)
    return differing / max(1, sum(reference[name].numel() for name in codes))
