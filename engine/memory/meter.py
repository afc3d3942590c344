"""Counting the bytes that tensors hold, by what they are for.

`MemoryMeter` sees every tensor that an op returns (`torch.utils._python_dispatch`), counts each
storage once, and forgets it when torch frees it. It therefore knows the bytes that are alive, the
most there ever were, and to whom they belonged then. What an op allocates and frees inside itself
is not seen; what the meter counts is what a caching allocator calls "allocated".

The same meter serves a real step (the measurement) and a dry one on tensors without memory
(`engine.memory.simulate.step`, the plan), so the two can be compared byte by byte.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.runtime.scratch
from engine.errors import MemoryPlanError
from models.decoder import Decoder
from models.layers.block import BlockSaved, DecoderLayer
from models.layers.context import LayerContext
from models.layers.linear import Embedding
from models.memory.offload import WeightStream, quantized_weights, tensors_of
from optim.adamw8bit import AdamW8bit
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
    "loss chunk",
    "scratch",
    "batch",
)
"""Who may hold memory, in the order in which tables show them."""

SCRATCH = ("scratch", "loss chunk")
"""The owners of buffers that grow to their largest use and stay."""

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

    aside: tuple[str, ...] = ()
    """Owners that are left out of peaks."""

    def __init__(self, granule: int = 1, limit: int | None = None) -> None:
        super().__init__()
        self.granule, self.limit = granule, limit
        self.owner = "block working set"
        self.total = self.high = 0
        self.live: dict[str, int] = dict.fromkeys(OWNERS, 0)
        self.segments: dict[Segment, Peak] = {}
        self._segment = self.segments.setdefault(("start", 0), Peak())
        self._held: dict[int, tuple[Any, str, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; torch need not import its compiler to keep out of the way."""
        return False

    @property
    def counted(self) -> int:
        """The bytes alive now that count towards a peak."""
        return self.total - sum(self.live[owner] for owner in self.aside)

    @property
    def peak(self) -> Peak:
        """The highest peak of all segments."""
        self.mark()
        return max(self.segments.values(), key=lambda peak: peak.bytes)

    def begin(self, kind: str, index: int = 0) -> None:
        """Start counting the peak of another stretch; the same name goes on with the earlier."""
        self.mark()
        self._segment = self.segments.setdefault((kind, index), Peak())

    def __exit__(self, *error: Any) -> None:
        self.mark()
        super().__exit__(*error)

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

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count these as nothing: they lie in a mapped file."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._held[key] = (weakref.ref(storage, partial(self._freed, key)), OWNERS[-1], 0)

    def bump(self, transient: int) -> None:
        """Count bytes that come and go inside one op."""
        self.total += transient
        self.live[self.owner] += transient
        self.mark()
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
        if self.limit is not None and self.total > self.limit:
            raise MemoryPlanError(
                f"This step holds {gib(self.total)} of tensors, more than the memory budget of "
                f"{gib(self.limit)}. Raise --memory-budget, or lower --batch-size or --max-length; "
                "`engine plan` shows what each takes."
            )

    def _freed(self, key: int, _: object) -> None:
        self.mark()
        _, owner, size = self._held.pop(key)
        self.total -= size
        self.live[owner] -= size

    def _move(self, key: int, owner: str) -> None:
        reference, before, size = self._held[key]
        self._held[key] = (reference, owner, size)
        self.live[before] -= size
        self.live[owner] += size

    def mark(self) -> None:
        """Take note of the bytes that are alive: called before any of them is freed."""
        counted = self.counted
        self.high = max(self.high, counted)
        if counted > self._segment.bytes:
            self._segment.bytes = counted
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
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            weight = module.weight
            meter.track(
                "embeddings", [weight] if isinstance(weight, Tensor) else tensors_of(weight)
            )
        for weight in quantized_weights(module).values():
            meter.track("head" if name == "lm_head" else "NF4 base", tensors_of(weight))


def _owner_of(name: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf.startswith("lora"):
        return "adapters"
    if name.startswith("lm_head"):
        return "head"
    if "embed_tokens" in name:
        return "embeddings"
    return "norms and biases" if leaf == "bias" or "norm" in name else "dense base"


class _WatchedScratch(dict[Any, Tensor]):
    """Scratch buffers, counted as scratch, or as the loss's chunk where they hold logits."""

    def __init__(self, meter: MemoryMeter, buffers: Mapping[Any, Tensor]) -> None:
        super().__init__()
        self._meter = meter
        self._before: str | None = None
        for key, buffer in buffers.items():
            self[key] = buffer

    def pop(self, key: Any, *default: Any) -> Any:
        """A buffer goes because a larger one is allocated next."""
        self._before, self._meter.owner = self._meter.owner, _scratch_owner(key)
        return super().pop(key, *default)

    def __setitem__(self, key: Any, buffer: Tensor) -> None:
        if self._before is not None:
            self._meter.owner, self._before = self._before, None
        self._meter.track(_scratch_owner(key), [buffer])
        super().__setitem__(key, buffer)


def _scratch_owner(key: Any) -> str:
    return "loss chunk" if key[0] == "logits" else "scratch"


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


@contextmanager
def observed(meter: MemoryMeter, *, fresh_scratch: bool = False) -> Iterator[None]:
    """While entered, a training step tells the meter where it is, and so whose the memory is.

    With `fresh_scratch` the scratch buffers of the process are set aside for the while.
    """
    run, backward = DecoderLayer.forward, DecoderLayer.backward
    bring = WeightStream._bring
    build, step = FlatState.__init__, AdamW8bit.step
    work = meter.owner

    def watched_forward(
        layer: DecoderLayer, x: Tensor, context: LayerContext, policy: str = "none"
    ) -> tuple[Tensor, BlockSaved]:
        meter.owner = work
        meter.begin("forward", layer.index)
        y, kept = run(layer, x, context, policy)
        meter.hand_over(work, "checkpoints")
        meter.owner = "loss"
        meter.begin("loss")
        return y, kept

    def watched_backward(
        layer: DecoderLayer,
        dy: Tensor,
        x: Tensor,
        context: LayerContext,
        kept: BlockSaved,
        need_dx: bool,
    ) -> Any:
        meter.owner = work
        meter.begin("backward", layer.index)
        dx, grads = backward(layer, dy, x, context, kept, need_dx)
        meter.track("gradients", grads.values())
        meter.begin("between layers", layer.index)
        return dx, grads

    def watched_bring(stream: WeightStream, index: int) -> Any:
        weights, event = bring(stream, index)
        for named in weights:
            for weight in named.values():
                meter.track("NF4 base", tensors_of(weight))
        return weights, event

    def watched_build(state: FlatState, *args: Any) -> None:
        before, meter.owner = meter.owner, "optimiser"
        try:
            build(state, *args)
        finally:
            meter.owner = before

    def watched_step(optimizer: AdamW8bit, *args: Any, **options: Any) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        meter.track("gradients", [p.grad for p in parameters if p.grad is not None])
        if options.get("only") is not None:  # in the midst of backward
            return step(optimizer, *args, **options)
        meter.begin("update")
        result = step(optimizer, *args, **options)
        meter.begin("between steps")
        return result

    earlier = kernels.runtime.scratch._buffers
    buffers = _WatchedScratch(meter, {} if fresh_scratch else earlier)
    if not fresh_scratch:
        earlier.clear()  # or it would hold on to what is replaced by larger ones
    try:
        with replaced(
            (DecoderLayer, "forward", watched_forward),
            (DecoderLayer, "backward", watched_backward),
            (WeightStream, "_bring", watched_bring),
            (FlatState, "__init__", watched_build),
            (AdamW8bit, "step", watched_step),
            (kernels.runtime.scratch, "_buffers", buffers),
        ):
            yield
    finally:
        if not fresh_scratch:
            earlier.update(buffers)
