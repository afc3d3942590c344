"""Which way a dry pass takes through the kernels: the CPU's or a CUDA card's, and its short cuts.

On a card's way meta tensors say that they lie on `CARD`, Triton kernels are not launched, and what
asks the machine for a card is answered. Short cuts run an op that works in many small parts once
for each shape; afterwards the peak that it had is counted again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

import engine.load
import kernels.attention
import kernels.attention_backends
import kernels.cross_entropy
import kernels.dropout
import kernels.linear_cross_entropy
import kernels.nf4
import kernels.nf4_layout
import kernels.tiling
import optim.adamw8bit
from engine.dry_meter import META, DryMeter
from kernels.nf4 import NESTED_BLOCK, NF4Weight
from kernels.nf4_layout import BLOCK, PlanarNF4Weight
from kernels.triton_support import HAS_TRITON, _AbsentKernel
from models.config import ModelConfig
from models.decoder import Decoder

CARD = torch.device("cuda", 127)
"""The device that meta tensors claim. No machine has it, so nothing cached for it is ever used."""

_ATTENTION = ("flash", "documents")
_DEVICE, _IS_CUDA, _IS_CPU = torch.Tensor.device, torch.Tensor.is_cuda, torch.Tensor.is_cpu


class _OncePerShape:
    """Runs an op for the first of each key, and for the others counts the peak that it had."""

    def __init__(self, meter: DryMeter) -> None:
        self._meter = meter
        self._transient: dict[Any, int] = {}

    def __call__(self, key: Any, run: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """What `run` returns; `make` must return the like of it. Scratch may stay behind."""
        meter = self._meter
        if key in self._transient:
            result = make()
            meter.bump(self._transient[key])
            return result
        meter.mark()
        outer, meter.high = meter.high, meter.counted
        result = run()
        meter.mark()
        self._transient[key] = meter.high - meter.counted
        meter.high = max(outer, meter.high)
        return result


_ENOUGH = 1 << 23
"""Elements after which decoding has met every size of temporary it will ever take."""


def shortcuts(meter: DryMeter) -> list[tuple[Any, str, Any]]:
    """Replacements of the ops that work in many small parts."""
    once = _OncePerShape(meter)
    decode, rows_loss = kernels.nf4.dequantize, kernels.cross_entropy.cross_entropy_
    step_slab, drop = optim.adamw8bit._step_slab, kernels.dropout.dropout
    quantize_flat, planar = kernels.nf4._quantize_flat, kernels.nf4_layout.to_planar

    def dry_planar(weight: NF4Weight) -> Any:
        return once(
            ("planar", weight.shape, weight.block_size, weight.nested_absmax is None),
            lambda: planar(weight),
            lambda: _meta_planar(weight),
        )

    def dry_quantize(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        few = flat[: 4 * kernels.nf4._QUANTIZE_SLAB]
        whole = meta_nf4((1, flat.numel()), False, flat.dtype, block_size)
        once(
            ("quantise", few.shape, flat.dtype, block_size),
            lambda: _dropped(quantize_flat(few, block_size)),
            lambda: None,
        )
        return whole.packed, whole.absmax

    def dry_decode(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Any:
        target = torch.empty(weight.shape, dtype=dtype, device="meta") if out is None else out
        few = _some_rows(weight)
        once(
            ("decode", few.shape, dtype, weight.nested_absmax is None),
            lambda: decode(few, dtype, out=target.view(-1)[: few.numel()]),
            lambda: None,
        )
        return target

    def dry_loss(
        logits: Tensor, targets: Tensor, scale: float = 1.0, *, gradient: bool = True
    ) -> Any:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return once(
            ("loss", logits.shape, logits.dtype, gradient),
            lambda: rows_loss(logits, targets, scale, gradient=gradient),
            lambda: torch.empty(logits.shape[0], dtype=wide, device="meta"),
        )

    def dry_step(flat: Any, slab: Any, params: Any, *rest: Any) -> None:
        pieces = tuple((p.end - p.begin, params[p.index].dtype) for p in slab.pieces)
        once(
            ("slab", slab.quantized, slab.rows, pieces),
            lambda: step_slab(flat, slab, params, *rest),
            lambda: None,
        )

    def dry_drop(x: Tensor, p: float, seed: int) -> Any:
        if p <= 0.0:
            return drop(x, p, seed)
        return once(
            ("dropout", x.shape, x.dtype),
            lambda: drop(x, p, seed),
            lambda: torch.empty(x.shape, dtype=x.dtype, device="meta"),
        )

    changes: list[tuple[Any, str, Any]] = [(engine.load, "Decoder", _skeleton)]
    for function, dry in (
        (decode, dry_decode),
        (rows_loss, dry_loss),
        (drop, dry_drop),
        (step_slab, dry_step),
        (quantize_flat, dry_quantize),
        (planar, dry_planar),
    ):
        changes += [(module, name, dry) for module, name in _users(function)]
    return changes


def _dropped(result: Any) -> None:
    """Forget a result, so that only what it took to make it is counted."""
    del result


def _skeleton(config: ModelConfig) -> Decoder:
    """A model before its weights: meta tensors that a real run has too, and holds no memory for."""
    with _disable_current_modes():
        return Decoder(config)


def _users(function: Any) -> list[tuple[ModuleType, str]]:
    """Every module of this program that calls `function` by a name of its own, and that name."""
    ours = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("kernels", "models", "optim", "engine") and module is not None
    ]
    return [
        (module, name)
        for module in ours
        for name, value in list(vars(module).items())
        if value is function
    ]


def meta_nf4(
    shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype, block_size: int = 64
) -> NF4Weight:
    """An `NF4Weight` with the sizes of a real one and no memory."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // block_size)

    def empty(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    packed = empty(((numel + 1) // 2,), torch.uint8)
    if not double_quant:
        absmax = empty((blocks,), torch.float32)
        return NF4Weight(packed, absmax, None, None, shape, block_size, dtype)
    nested = empty((-(-blocks // NESTED_BLOCK),), torch.float32)
    absmax = empty((blocks,), torch.uint8)
    return NF4Weight(packed, absmax, nested, empty((), torch.float32), shape, block_size, dtype)


def _meta_planar(weight: NF4Weight) -> PlanarNF4Weight:
    rows, blocks = weight.shape[0], weight.shape[1] // BLOCK
    return PlanarNF4Weight(
        codes=torch.empty(blocks, rows, BLOCK // 4, dtype=torch.int16, device="meta"),
        absmax=torch.empty(blocks, rows, dtype=weight.absmax.dtype, device="meta"),
        nested_absmax=weight.nested_absmax,
        nested_offset=weight.nested_offset,
        shape=weight.shape,
        block_size=weight.block_size,
        dtype=weight.dtype,
    )


def _some_rows(weight: NF4Weight) -> NF4Weight:
    """The first rows of a weight, enough for every temporary of decoding it."""
    rows = min(weight.shape[0], -(-_ENOUGH // weight.shape[1]))
    if rows == weight.shape[0]:
        return weight
    packed = weight.packed[: (rows * weight.shape[1] + 1) // 2]
    return replace(weight, packed=packed, shape=(rows, weight.shape[1]))


def _no_launch(kernel: Any, grid: Any) -> Callable[..., None]:
    return lambda *args, **options: None


class OnCard(TorchFunctionMode):
    """Meta tensors say that they lie on `CARD`, and what is to lie there becomes a meta tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        asked = getattr(func, "__self__", None)
        if asked is _DEVICE or asked is _IS_CUDA:
            if args[0].is_meta:
                return CARD if asked is _DEVICE else True
            return func(*args)
        if options.get("device") == CARD:
            options["device"] = META
        if any(isinstance(x, torch.device) for x in args):
            args = tuple(META if isinstance(x, torch.device) and x == CARD else x for x in args)
        return func(*args, **options)


def also_backward(mode: TorchFunctionMode) -> tuple[Any, str, Any]:
    """autograd calls the backward half of a function without the mode; this enters it again."""
    owner = torch.autograd.function.BackwardCFunction
    apply = owner.apply

    def apply_in_mode(node: Any, *grads: Any) -> Any:
        with mode:
            return apply(node, *grads)

    return owner, "apply", apply_in_mode


class OnHost(TorchFunctionMode):
    """Meta tensors say that they lie in the CPU's memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__self__", None) is _IS_CPU and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def card_ways() -> list[tuple[Any, str, Any]]:
    """Replacements of what asks the machine for a card."""
    if HAS_TRITON:
        from triton.runtime.jit import KernelInterface as Kernel
    else:
        Kernel = _AbsentKernel
    return [
        (torch.cuda, "current_device", lambda: CARD.index),
        (kernels.linear_cross_entropy, "_multiplies_into_fp32", lambda device, dtype: True),
        (kernels.attention_backends, "_works", lambda backend, kind: backend.name in _ATTENTION),
        (kernels.tiling, "_device_numbers", lambda device: (80, 108)),
        (Kernel, "__getitem__", _no_launch),
    ]
