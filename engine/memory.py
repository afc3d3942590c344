"""Counting the bytes that tensors hold, by what they are for.

`MemoryMeter` sees every tensor that an op returns (`torch.utils._python_dispatch`), counts each
storage once, and forgets it when torch frees it. It therefore knows the bytes that are alive, the
most there ever were, and to whom they belonged then. What an op allocates and frees inside itself
is not seen; what the meter counts is what a caching allocator calls "allocated".

The same meter serves a real step (the measurement) and a dry one on tensors without memory
(`engine.dry_pass`, the plan), so the two can be compared byte by byte.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.scratch
from engine.errors import MemoryPlanError
from kernels.nf4 import NF4Weight
from models.block import Batch, DecoderLayer, Kept
from models.decoder import Decoder
from models.linear import Linear
from optim.flat_state import FlatState

OWNERS = (
    "NF4 base",
    "dense base",
    "embeddings",
    "head",
    "norms and biases",
    "adapters",
    "gradients",
    "optimiser",
    "checkpoints",
    "block working set",
    "loss",
    "scratch",
    "batch",
)
"""Who may hold memory, in the order in which tables show them."""

Segment = tuple[str, int]
"""A stretch of a step: ("forward" | "backward", layer), ("loss", 0), ("update", 0), ..."""


@dataclass
class Peak:
    """The most bytes of one stretch, and how they were divided."""

    bytes: int = 0
    owners: dict[str, int] = field(default_factory=dict)


class MemoryMeter(TorchDispatchMode):
    """Counts live storages while it is entered.

    `granule` rounds every storage up, as an allocator does. With a `limit`, the op that takes the
    total over it raises `MemoryPlanError` as soon as it returns.
    """

    def __init__(self, granule: int = 1, limit: int | None = None) -> None:
        super().__init__()
        self.granule, self.limit = granule, limit
        self.owner = "block working set"
        self.total = 0
        self.live: dict[str, int] = dict.fromkeys(OWNERS, 0)
        self.segments: dict[Segment, Peak] = {}
        self._segment = self.segments.setdefault(("start", 0), Peak())
        self._held: dict[int, tuple[Any, str, int]] = {}

    @property
    def peak(self) -> Peak:
        """The highest peak of all segments."""
        return max(self.segments.values(), key=lambda peak: peak.bytes)

    def begin(self, kind: str, index: int = 0) -> None:
        """Start counting the peak of another stretch; the same name goes on with the earlier."""
        self._segment = self.segments.setdefault((kind, index), Peak())
        self._mark()

    def track(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, or change the owner of those that are counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            held = self._held.get(storage._cdata)
            if held is None:
                self._add(storage, owner)
            elif held[1] != owner:
                self._move(storage._cdata, owner)

    def hand_over(self, source: str, target: str) -> None:
        """Everything alive that belongs to `source` belongs to `target` from now on."""
        for key in [key for key, held in self._held.items() if held[1] == source]:
            self._move(key, target)

    def bump(self, transient: int) -> None:
        """Count bytes that come and go inside one op."""
        self.total += transient
        self.live[self.owner] += transient
        self._mark()
        self.total -= transient
        self.live[self.owner] -= transient

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self.execute(func, args, dict(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, list | tuple):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item)
        return result

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._add(storage, self.owner)

    def _add(self, storage: torch.UntypedStorage, owner: str) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._held[key] = (weakref.ref(storage, partial(self._freed, key)), owner, size)
        self.total += size
        self.live[owner] += size
        self._mark()
        if self.limit is not None and self.total > self.limit:
            raise MemoryPlanError(
                f"This step holds {gib(self.total)} of tensors, more than the memory budget of "
                f"{gib(self.limit)}. Raise --memory-budget, or lower --batch-size or --max-length; "
                "`engine plan` shows what each takes."
            )

    def _freed(self, key: int, _: object) -> None:
        _, owner, size = self._held.pop(key)
        self.total -= size
        self.live[owner] -= size

    def _move(self, key: int, owner: str) -> None:
        reference, before, size = self._held[key]
        self._held[key] = (reference, owner, size)
        self.live[before] -= size
        self.live[owner] += size
        if self.total == self._segment.bytes:
            self._segment.owners = dict(self.live)

    def _mark(self) -> None:
        if self.total > self._segment.bytes:
            self._segment.bytes = self.total
            self._segment.owners = dict(self.live)


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def track_model(meter: MemoryMeter, model: Decoder) -> None:
    """Count what a model holds, by owner."""
    for name, parameter in model.named_parameters():
        meter.track(_owner_of(name), [parameter])
        if parameter.grad is not None:
            meter.track("gradients", [parameter.grad])
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.weight, NF4Weight):
            weight = module.weight
            parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset)
            meter.track("NF4 base", [part for part in parts if part is not None])


def _owner_of(name: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("lora_A", "lora_B"):
        return "adapters"
    if name.startswith("lm_head"):
        return "head"
    if "embed_tokens" in name:
        return "embeddings"
    return "norms and biases" if leaf == "bias" or "norm" in name else "dense base"


class _WatchedScratch(dict[Any, Tensor]):
    """Scratch buffers whose memory is counted as scratch, or as the loss where they hold logits."""

    def __init__(self, meter: MemoryMeter, buffers: Mapping[Any, Tensor]) -> None:
        super().__init__()
        self._meter = meter
        for key, buffer in buffers.items():
            self[key] = buffer

    def __setitem__(self, key: Any, buffer: Tensor) -> None:
        self._meter.track("loss" if key[0] == "logits" else "scratch", [buffer])
        super().__setitem__(key, buffer)


@contextmanager
def observed(meter: MemoryMeter, *, fresh_scratch: bool = False) -> Iterator[None]:
    """While entered, a training step tells the meter where it is, and so whose the memory is.

    With `fresh_scratch` the scratch buffers of the process are set aside for the while.
    """
    run, differentiate, build = DecoderLayer.run, DecoderLayer.differentiate, FlatState.__init__

    def watched_run(layer: DecoderLayer, x: Tensor, batch: Batch) -> tuple[Tensor, Kept]:
        meter.hand_over("block working set", "checkpoints")
        meter.begin("forward", layer.index)
        y, kept = run(layer, x, batch)
        meter.begin("loss")
        return y, kept

    def watched_differentiate(
        layer: DecoderLayer, dy: Tensor, x: Tensor, batch: Batch, kept: Kept, need_dx: bool
    ) -> Any:
        meter.begin("backward", layer.index)
        dx, grads = differentiate(layer, dy, x, batch, kept, need_dx)
        meter.track("gradients", grads.values())
        meter.begin("between layers")
        return dx, grads

    def watched_build(state: FlatState, *args: Any) -> None:
        meter.begin("update")
        before, meter.owner = meter.owner, "optimiser"
        try:
            build(state, *args)
        finally:
            meter.owner = before

    buffers = _WatchedScratch(meter, {} if fresh_scratch else kernels.scratch._buffers)
    with ExitStack() as stack:
        for owner, name, value in (
            (DecoderLayer, "run", watched_run),
            (DecoderLayer, "differentiate", watched_differentiate),
            (FlatState, "__init__", watched_build),
            (kernels.scratch, "_buffers", buffers),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
        if not fresh_scratch:
            kept_buffers = dict(buffers)
            stack.callback(lambda: kernels.scratch._buffers.update(kept_buffers))
