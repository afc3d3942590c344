"""Accuracy of the kernels that no case of ``engine bench`` runs.

Their op is called three times: on the device as it runs there, with ENGINE_REFERENCE=1 in the same
dtype (plain torch), and in float64, which always takes the reference (the truth).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu.accuracy import compare, poison
from bench.gpu.step import clear
from engine.benchmark.case import Tensors, gradients, leaf
from kernels.attention import AttentionPlan
from kernels.delta_net import gated_delta
from kernels.elementwise.dropout import Seed, dropout
from kernels.elementwise.rms_norm import rms_norm
from kernels.nf4 import quantize
from kernels.nf4.dequantize_triton import nf4_dequantize
from kernels.nf4.planar import to_planar

Function = Callable[[Tensors], Tensors]


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


def check(name: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> dict[str, Any]:
    """Errors of every output of the op `name` of `OPS`."""
    clear(device)
    inputs, function, exact = OPS[name](device, dtype, small)
    poison(device)
    ours = function(inputs)
    with references():
        plain = function(inputs)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = plain if exact else function(wide)
    outputs = {
        key: compare(ours[key].detach(), plain[key], truth[key], exact=exact) for key in truth
    }
    return {"outputs": outputs, "passed": all(entry["passed"] for entry in outputs.values())}


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _dropout(
    device: torch.device, dtype: torch.dtype, small: bool
) -> tuple[Tensors, Function, bool]:
    x = _random(device, dtype, *((7, 33) if small else (4001, 4096)))
    return {"x": x}, lambda t: {"y": dropout(t["x"], 0.1, Seed(0x1234_5678_9ABC))}, False


def _layouts(
    device: torch.device, dtype: torch.dtype, small: bool
) -> tuple[Tensors, Function, bool]:
    """Both orders of the codes, straight and transposed, and the quantiser itself."""
    w = _random(device, dtype, *((33, 128) if small else (4097, 4096)))

    def function(t: Tensors) -> Tensors:
        flat = quantize(t["w"])
        planar = to_planar(flat)
        return {
            "flat": nf4_dequantize(flat, dtype),
            "planar": nf4_dequantize(planar, dtype),
            "flat transposed": nf4_dequantize(flat, dtype, transposed=True),
            "planar transposed": nf4_dequantize(planar, dtype, transposed=True),
        }

    return {"w": w}, function, True


def _zero_centred_norm(
    device: torch.device, dtype: torch.dtype, small: bool
) -> tuple[Tensors, Function, bool]:
    """Weight gradient and zero-centred weights, at an awkward width."""
    rows, width = (5, 63) if small else (4001, 5120)
    inputs = {
        "x": _random(device, dtype, rows, width),
        "weight": 0.1 * _random(device, dtype, width),
        "dy": _random(device, dtype, rows, width),
    }

    def function(t: Tensors) -> Tensors:
        leaves = {name: leaf(t[name]) for name in ("x", "weight")}
        y = rms_norm(leaves["x"], leaves["weight"], zero_centered=True)
        return {"y": y.detach(), **gradients(y, leaves, t["dy"])}

    return inputs, function, False


def _gated_delta(
    device: torch.device, dtype: torch.dtype, small: bool
) -> tuple[Tensors, Function, bool]:
    tokens, heads, value_heads, size = (40, 1, 2, 16) if small else (2000, 4, 8, 128)
    bounds = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    plan = AttentionPlan.from_cu_seqlens(bounds, tokens)
    q, k = (_random(device, dtype, tokens, heads, size) for _ in range(2))
    inputs = {
        "q": q / q.float().norm(dim=-1, keepdim=True).to(dtype) * size**-0.5,
        "k": k / k.float().norm(dim=-1, keepdim=True).to(dtype),
        "v": _random(device, dtype, tokens, value_heads, size),
        "g": -torch.rand(tokens, value_heads, device=device),
        "beta": torch.rand(tokens, value_heads, device=device),
        "do": _random(device, dtype, tokens, value_heads, size),
    }

    def function(t: Tensors) -> Tensors:
        leaves = {name: leaf(t[name]) for name in ("q", "k", "v", "g", "beta")}
        o, _ = gated_delta(leaves["q"], leaves["k"], leaves["v"], leaves["g"], leaves["beta"], plan)
        return {"o": o.detach(), **gradients(o, leaves, t["do"])}

    return inputs, function, False


OPS: dict[str, Callable[[torch.device, torch.dtype, bool], tuple[Tensors, Function, bool]]] = {
    "dropout": _dropout,
    "nf4_layouts": _layouts,
    "rms_norm_zero_centred": _zero_centred_norm,
    "gated_delta": _gated_delta,
}
