"""Count the bytes that tensors hold, by what they are for.

`MemoryMeter` sees every tensor that an op returns (`torch.utils._python_dispatch`), counts each
storage once, and forgets it when torch frees it. It therefore knows the bytes that are alive, the
most there ever were, and to whom they belonged then. What an op allocates and frees inside itself
is not seen; what the meter counts is what a caching allocator calls "allocated".

The same meter serves a real step (the measurement) and a simulated one on tensors without memory
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

from engine.errors import MemoryPlanError, gib
from models.memory.absent import Absent

OWNERS = (
    "NF4 base",
    "decoded base",
    "dense base",
    "divided layers",
    "embeddings",
    "head",
    "norms and biases",
    "adapters",
    "trained weights",
    "gradients",
    "optimiser",
    "moving average",
    "saved activations",
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
"""A part of a step: ("forward" | "backward", layer), ("loss", 0), ("update", 0), ..."""


@dataclass
class Peak:
    """The most bytes of one segment, and how they were divided."""

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
        self._storages: dict[int, tuple[Any, str, int]] = {}

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
        """Start or continue to count the peak of a segment."""
        self.mark()
        self._segment = self.segments.setdefault((kind, index), Peak())

    def __exit__(self, *error: Any) -> None:
        self.mark()
        super().__exit__(*error)

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """What is allocated inside belongs to `owner`."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before

    def track(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, or change the owner of those that are counted."""
        for tensor in tensors:
            if isinstance(tensor, Absent):
                continue
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._add(storage, owner)
            elif known[1] != owner:
                self._move(storage._cdata, owner)

    def hand_over(self, source: str, target: str) -> None:
        """Everything alive that belongs to `source` belongs to `target` from now on."""
        for key in [key for key, entry in self._storages.items() if entry[1] == source]:
            self._move(key, target)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count these as nothing: they lie in a mapped file."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._storages[key] = (weakref.ref(storage, partial(self._freed, key)), OWNERS[-1], 0)

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
        if isinstance(tensor, Absent):  # which says that it has a storage
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._add(storage, self.owner)

    def _add(self, storage: torch.UntypedStorage, owner: str) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._storages[key] = (weakref.ref(storage, partial(self._freed, key)), owner, size)
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
        _, owner, size = self._storages.pop(key)
        self.total -= size
        self.live[owner] -= size

    def _move(self, key: int, owner: str) -> None:
        reference, before, size = self._storages[key]
        self._storages[key] = (reference, owner, size)
        self.live[before] -= size
        self.live[owner] += size

    def mark(self) -> None:
        """Take note of the bytes that are alive: called before any of them is freed."""
        counted = self.counted
        self.high = max(self.high, counted)
        if counted > self._segment.bytes:
            self._segment.bytes = counted
            self._segment.owners = dict(self.live)
