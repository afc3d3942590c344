"""bitsandbytes' and Liger's forms of the ops, where they are installed.

`baselines(op, work)` is what ``engine bench --against bench.peers`` and the suite call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from engine.benchmark.cases.case import Work, leaf
from engine.benchmark.timing import Call
from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4 import NF4_CODE, NF4Weight
from kernels.nf4.weight import NESTED_BLOCK


def baselines(op: str, work: Work) -> dict[str, Call]:
    """Other implementations of `op` on the same inputs, by name."""
    calls: dict[str, Call] = {}
    for name, package, table in (
        ("bitsandbytes", "bitsandbytes", _BITSANDBYTES),
        ("Liger", "liger_kernel", _LIGER),
    ):
        if op in table and find_spec(package) is not None:
            calls[name] = table[op](work)
    return calls


def quant_state(weight: NF4Weight) -> Any:
    """bitsandbytes' description of a doubly quantised weight."""
    from bitsandbytes.functional import QuantState

    device = weight.device
    nested = QuantState(
        absmax=weight.nested_absmax,
        blocksize=NESTED_BLOCK,
        code=dynamic_map(True, device),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        dtype=weight.dtype,
        blocksize=weight.block_size,
        code=NF4_CODE.to(device),
        quant_type="nf4",
        offset=weight.nested_offset,
        state2=nested,
    )


def _dequantize(work: Work) -> Call:
    from bitsandbytes.functional import dequantize_4bit

    weight = work.quantized["weight"]
    return partial(dequantize_4bit, weight.packed.view(-1, 1), quant_state(weight))


def _quantize(work: Work) -> Call:
    from bitsandbytes.functional import quantize_4bit

    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}
    return partial(quantize_4bit, work.tensors["w"], **options)


def _linear4bit(work: Work) -> Call:
    from bitsandbytes import matmul_4bit

    weight = work.quantized["weight"]
    return partial(
        matmul_4bit,
        work.tensors["x"],
        weight.packed.view(-1, 1).t(),
        quant_state=quant_state(weight),
    )


def _adamw(work: Work) -> Call:
    from bitsandbytes.optim import AdamW8bit

    params = [leaf(like.clone()) for like in work.parameters]
    for param in params:
        param.grad = torch.randn_like(param) * 0.01
    step: Call = AdamW8bit(params, lr=1e-5).step
    return step


def _liger(module: str, name: str) -> Any:
    """One of Liger's autograd functions."""
    return getattr(import_module(f"liger_kernel.ops.{module}"), name)


def _liger_norm(work: Work) -> Call:
    function = _liger("rms_norm", "LigerRMSNormFunction")
    t = work.tensors
    return lambda: function.apply(t["x"], t["weight"], 1e-5, 0.0, "llama", False)


def _liger_norm_grad(work: Work) -> Call:
    function = _liger("rms_norm", "LigerRMSNormFunction")
    t = work.tensors

    def call() -> object:
        x = leaf(t["x"])
        y = function.apply(x, t["weight"], 1e-5, 0.0, "llama", False)
        return torch.autograd.grad(y, x, t["dy"])

    return call


def _liger_swiglu(work: Work) -> Call:
    function = _liger("swiglu", "LigerSiLUMulFunction")
    t = work.tensors
    return lambda: function.apply(t["gate"], t["up"])


def _liger_swiglu_grad(work: Work) -> Call:
    function = _liger("swiglu", "LigerSiLUMulFunction")
    t = work.tensors
    # Liger's backward pass writes the gradients over what it saved.
    gate, up = leaf(t["gate"].clone()), leaf(t["up"].clone())

    def call() -> object:
        return torch.autograd.grad(function.apply(gate, up), (gate, up), t["dh"])

    return call


def _liger_rope(work: Work) -> Call:
    function = _liger("rope", "LigerRopeFunction")
    t = work.tensors
    q, k = (t[name].transpose(0, 1).unsqueeze(0).clone() for name in ("q", "k"))
    cos, sin = (torch.cat((t[n], t[n]), -1).unsqueeze(0).to(q.dtype) for n in ("cos", "sin"))
    return lambda: function.apply(q, k, cos, sin)


def _liger_cross_entropy(work: Work) -> Call:
    function = _liger("cross_entropy", "LigerCrossEntropyFunction")
    t = work.tensors
    logits = leaf(t["logits"].clone())
    # The gradient is formed in the forward pass, in place, as in ours.
    return lambda: function.apply(logits, t["targets"], None)


def _liger_head(work: Work) -> Call:
    function = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    t = work.tensors

    def call() -> object:
        hidden = leaf(t["hidden"])
        loss = function.apply(hidden, t["weight"], t["labels"])
        loss = loss[0] if isinstance(loss, tuple) else loss
        return torch.autograd.grad(loss, hidden)

    return call


_BITSANDBYTES: dict[str, Callable[[Work], Call]] = {
    "nf4_quantize": _quantize,
    "nf4_dequantize": _dequantize,
    "nf4_linear": _linear4bit,
    "adamw8bit": _adamw,
}
_LIGER: dict[str, Callable[[Work], Call]] = {
    "rms_norm": _liger_norm,
    "rms_norm_grad": _liger_norm_grad,
    "swiglu": _liger_swiglu,
    "swiglu_grad": _liger_swiglu_grad,
    "rope": _liger_rope,
    "cross_entropy": _liger_cross_entropy,
    "linear_cross_entropy": _liger_head,
}
