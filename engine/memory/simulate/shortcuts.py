"""Short cuts of a simulated step through what works in many small parts.

An op of many parts runs once for each shape; afterwards the peak that it had is counted again. Of
many equal tiles and chunks, which end where they began, a few are enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import engine.model_sources.load_model
import kernels.elementwise.dropout
import kernels.linear.int8
import kernels.loss.cross_entropy
import kernels.loss.linear_cross_entropy
import kernels.moe.grouped_matmul
import kernels.nf4.planar
import kernels.nf4.weight
import models.layers.token_tiles
import optim.adamw8bit
from engine.memory.simulate.simulated_meter import META, SimulatedMeter
from kernels.linear.int8 import Int8Weight
from kernels.moe.grouped_matmul import ExpertWeights, Groups, weight_shape
from kernels.nf4.planar import BLOCK, PlanarNF4Weight
from kernels.nf4.weight import NESTED_BLOCK, NF4Weight
from kernels.runtime.scratch import scratch
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.rotary import Rotary


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes (owner, name, value) for the length of a block."""
    before = [
        (owner, name, name in vars(owner), getattr(owner, name)) for owner, name, _ in changes
    ]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, own, value in before:
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


class _OncePerShape:
    """Runs an op for the first of each key, and for the others counts the peak that it had."""

    def __init__(self, meter: SimulatedMeter) -> None:
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


def shortcuts(meter: SimulatedMeter) -> list[tuple[Any, str, Any]]:
    """Replacements of the ops that work in many small parts."""
    once = _OncePerShape(meter)
    decode, rows_loss = kernels.nf4.weight.dequantize, kernels.loss.cross_entropy.cross_entropy_
    step_slab, drop = optim.adamw8bit._step_slab, kernels.elementwise.dropout.dropout
    quantize_flat, planar = kernels.nf4.weight._quantize_flat, kernels.nf4.planar.to_planar
    expert = kernels.moe.grouped_matmul.expert_weight
    decode_rows, tiles = kernels.linear.int8.dequantize_int8, models.layers.token_tiles.token_tiles
    logits_of = kernels.loss.linear_cross_entropy.head_logits
    head_gradient = kernels.loss.linear_cross_entropy.head_gradient
    chunks, all_finite = (
        kernels.loss.linear_cross_entropy._chunks,
        engine.model_sources.load_model._all_finite,
    )
    products: dict[Any, float] = {}

    def counted(key: Any, run: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """As `once`, for ops whose operations are counted."""
        before = meter.flops
        meter.flops += products.get(key, 0.0)
        result = once(key, run, make)
        products.setdefault(key, meter.flops - before)
        return result

    def dry_planar(weight: NF4Weight) -> Any:
        return once(
            ("planar", weight.shape, weight.block_size, weight.nested_absmax is None),
            lambda: planar(weight),
            lambda: _meta_planar(weight),
        )

    def dry_quantize(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        few = flat[: 4 * kernels.nf4.weight._QUANTIZE_SLAB]
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

    def dry_decode_rows(
        weight: Int8Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Any:
        return once(
            ("rows", weight.shape, dtype, out is None),
            lambda: decode_rows(weight, dtype, out),
            lambda: (
                torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
                if out is None
                else out
            ),
        )

    def dry_logits(hidden: Tensor, head: Any, out: Tensor | None = None) -> Any:
        if isinstance(head, Tensor):
            return logits_of(hidden, head, out)
        return counted(
            ("logits", hidden.shape, head.shape, hidden.dtype, out is None),
            lambda: logits_of(hidden, head, out),
            lambda: hidden.new_empty(hidden.shape[0], head.shape[0]) if out is None else out,
        )

    def dry_head_gradient(dlogits: Tensor, head: Any, scale: float, target: Tensor) -> None:
        if isinstance(head, Tensor):
            head_gradient(dlogits, head, scale, target)
            return
        counted(
            ("dhead", dlogits.shape, head.shape, target.dtype),
            lambda: head_gradient(dlogits, head, scale, target),
            lambda: None,
        )

    def some(pieces: Sequence[Any]) -> Iterator[Any]:
        """Of many equal pieces the first two and the last, which may be short."""
        for index, piece in enumerate(pieces):
            if 2 <= index < len(pieces) - 1:
                continue
            before = meter.flops
            yield piece
            if index == 1:
                meter.flops += (meter.flops - before) * max(0, len(pieces) - 3)

    def dry_tiles(count: int, rows: int) -> Iterator[Any]:
        return some(list(tiles(count, rows)))

    def dry_chunks(count: int, rows: int) -> Iterator[Any]:
        return some(list(chunks(count, rows)))

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

    def dry_expert(weight: ExpertWeights, number: int, dtype: torch.dtype) -> Tensor:
        _, *shape = weight_shape(weight)
        found: Tensor = once(
            ("expert", weight_shape(weight), dtype, type(weight)),
            lambda: expert(weight, number, dtype),
            lambda: (
                weight[number].to(dtype)
                if isinstance(weight, Tensor)
                else scratch("dequantized.expert", tuple(shape), dtype, META)
            ),
        )
        return found

    changes: list[tuple[Any, str, Any]] = [
        (engine.model_sources.load_model, "Decoder", _skeleton),
        (
            engine.model_sources.load_model,
            "_all_finite",
            lambda x: all_finite(x.reshape(-1)[: engine.model_sources.load_model._PART]),
        ),
        (Groups, "bounds", property(_even_bounds)),
        (Rotary, "__call__", _dry_angles),
    ]
    for function, dry in (
        (decode, dry_decode),
        (decode_rows, dry_decode_rows),
        (logits_of, dry_logits),
        (head_gradient, dry_head_gradient),
        (chunks, dry_chunks),
        (tiles, dry_tiles),
        (rows_loss, dry_loss),
        (drop, dry_drop),
        (step_slab, dry_step),
        (quantize_flat, dry_quantize),
        (planar, dry_planar),
        (expert, dry_expert),
    ):
        changes += [(module, name, dry) for module, name in users(function)]
    return changes


_angles = Rotary.__call__


def _dry_angles(rotary: Rotary, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions are integers, which are real; what is computed of them need not be."""
    return _angles(rotary, torch.empty_like(position_ids, device=META), dtype)


def _even_bounds(groups: Groups) -> tuple[int, ...]:
    """The rows of experts that are all asked for equally often."""
    return tuple(groups.rows * edge // groups.count for edge in range(groups.count + 1))


def _dropped(result: Any) -> None:
    """Forget a result, so that only what it took to make it is counted."""
    del result


def _skeleton(config: ModelConfig) -> Decoder:
    """A model before its weights: meta tensors that a real run has too, and holds no memory for."""
    with _disable_current_modes():
        return Decoder(config)


def users(function: Any) -> list[tuple[ModuleType, str]]:
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
