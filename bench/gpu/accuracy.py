"""The one accuracy rule, at real sizes on the device itself.

With truth in float64 from the same rounded inputs, for every value and gradient:

    max|ours - truth| <= 2 * max|plain torch in the same dtype - truth| + 1 ulp

The ulp is that of our result's dtype at the largest true value. Before each op the allocator's free
memory is filled with NaN, so that an element which no code writes cannot look right. A decoded
weight and its plain twin must agree to the bit, and so must the codes of a quantised one. The 8-bit
optimiser has no float64 form: its codes on the device are compared with those of its reference on
the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.step import clear
from engine.benchmark.case import Case, Tensors
from optim import AdamW8bit

EXACT = ("nf4_quantize", "nf4_dequantize", "nf4_dequantize_transposed")
_POISON_BYTES = 4 << 30
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
    shapes = [(16, 4096), (4096, 16), (1024, 16), (127,), (300, 301)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    results = []
    for where in (device, torch.device("cpu")):
        params = [value.to(where, copy=True).requires_grad_() for value in start]
        optimizer = AdamW8bit(params, lr=1e-3, rounding="nearest")
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.to(where, copy=True)
            optimizer.step()
        state = {name: value.cpu() for name, value in optimizer.state_tensors().items()}
        results.append((state, torch.cat([param.detach().cpu().view(-1) for param in params])))
    (mine, mine_params), (reference, reference_params) = results
    apart = _codes_apart(mine, reference)
    change = float((mine_params - reference_params).abs().max())
    return {
        "codes_apart": apart,
        "largest_parameter_difference": change,
        "passed": apart <= _CODES_APART and change <= 1e-5,
    }


def _codes_apart(mine: Tensors, reference: Tensors) -> float:
    """Share of 8-bit codes that differ."""
    codes = [name for name, value in reference.items() if value.dtype == torch.uint8]
    differing = sum(int((mine[name] != reference[name]).sum()) for name in codes)
    return differing / max(1, sum(reference[name].numel() for name in codes))
