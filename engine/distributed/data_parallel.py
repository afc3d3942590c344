"""Data parallelism: gradients summed over ranks, updates divided among them.

Each rank computes some rows of a step, and every gradient is the sum over the ranks. Parameters are
owned, each by one rank, which alone has its optimizer state and moves it; then all ranks receive it
(ZeRO stage 1, Rajbhandari et al. 2020, arXiv 1910.02054). An owner has whole parameters, so every
optimizer computes what it would on one rank, those that work on whole matrices too.

Parameters lie in buckets of consecutive layers, gradients likewise: in a bucket first the part of
rank 0, then that of rank 1, all of one length. So a bucket takes one reduce_scatter, which starts
when backward has passed its layers and runs beside those that follow, and one all_gather after the
update. Buckets start in one order on all ranks, also on one that has no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from kernels.runtime.ranks import DONE, Ranks, Transfer
from optim.clip import global_norm

BUCKET_ELEMENTS = 1 << 22
"""From so many elements on a bucket takes no further layer, unless there are many ranks: a bucket
is as long as N times the largest part of any, so one with few tensors would be padding."""

_ALIGNED = 64
"""Elements: every parameter starts where wide loads may."""


class GradientBucket:
    """Parameters of one dtype that are reduced together, and their memory.

    `owners` are the ranks that update them.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks, loads: list[int]) -> None:
        """`loads` are the elements that ranks own in buckets before; those of this are added."""
        self.parameters = list(parameters)
        self._ranks = ranks
        owners = _owners([p.numel() for p in parameters], loads)
        offsets, filled = [], [0] * ranks.size
        for p, owner in zip(parameters, owners, strict=True):
            offsets.append(filled[owner])
            filled[owner] += -(-p.numel() // _ALIGNED) * _ALIGNED
        self._part = max(filled)
        first = parameters[0]
        size = self._part * ranks.size
        self._values, self._gradients = (
            torch.zeros(size, dtype=first.dtype, device=first.device) for _ in range(2)
        )
        self._reduced = torch.zeros_like(self._gradients[: self._part])
        self._views: list[tuple[Tensor, Tensor | None]] = []
        with torch.no_grad():
            for p, owner, offset in zip(parameters, owners, offsets, strict=True):
                begin, end = offset, offset + p.numel()
                whole = slice(owner * self._part + begin, owner * self._part + end)
                self._values[whole].copy_(p.detach().reshape(-1))
                p.data = self._values[whole].view_as(p)
                mine = owner == ranks.rank
                summed = self._reduced[begin:end].view_as(p) if mine else None
                self._views.append((self._gradients[whole].view_as(p), summed))
        self.owners = owners

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a rank gives to be summed; of the values, as many."""
        return self._gradients.numel() * self._gradients.element_size()

    @property
    def values(self) -> Tensor:
        """The parameters, flat."""
        return self._values

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's passes, flat, and what of all ranks' sums is its part."""
        return self._gradients, self._reduced

    def attach(self) -> None:
        """Let gradients start from zero in the bucket's memory."""
        self._gradients.zero_()
        for p, (gradient, _) in zip(self.parameters, self._views, strict=True):
            p.grad = gradient

    def reduce(self) -> Transfer:
        """Start the sum over all ranks of this rank's part."""
        return self._ranks.reduce_scatter(self._reduced, self._gradients)

    def detach(self) -> None:
        """Give the parameters of this rank the sums as gradients, and the others none."""
        for p, (_, summed) in zip(self.parameters, self._views, strict=True):
            p.grad = summed

    def gather(self) -> Transfer:
        """Start to bring every parameter from its owner."""
        begin = self._ranks.rank * self._part
        # The part is copied: not every back end reads and writes the same memory.
        return self._ranks.all_gather(self._values, self._values[begin:][: self._part].clone())


class DataParallel:
    """Sums the gradients of `units` over `ranks`, and hands out what owners updated.

    `units` are lists of parameters in the order in which backward reaches them. `data` are the
    ranks that the rows of a step are dealt to, by default the same; others share their batches.
    Raises `ValueError` where a parameter is in two of them, and where a rank would own none, unless
    it may be without (`spare`).
    """

    def __init__(
        self,
        ranks: Ranks,
        units: Sequence[Sequence[Tensor]],
        elements: int = BUCKET_ELEMENTS,
        data: Ranks | None = None,
        spare: bool = False,
    ) -> None:
        self.ranks, self.data = ranks, ranks if data is None else data
        self._loads = [0] * ranks.size
        largest = max((p.numel() for unit in units for p in unit), default=0)
        self.buckets = [
            GradientBucket(members, ranks, self._loads)
            for members in _bucketed(units, max(elements, ranks.size * largest))
        ]
        self._bucket_of = {
            id(p): number for number, b in enumerate(self.buckets) for p in b.parameters
        }
        count = sum(len(unit) for unit in units)
        if len(self._bucket_of) != count:
            raise ValueError("a parameter is in two units")
        if not (self.owned or spare):
            raise ValueError(
                f"{count} trained tensors are too few for {ranks.size} processes: rank "
                f"{ranks.rank} would have none to update"
            )
        self._missing = [len(b.parameters) for b in self.buckets]
        self._started: list[Transfer] = []

    @property
    def owned(self) -> set[int]:
        """The `id` of every parameter that this rank updates."""
        return self.owned_by(self.ranks.rank)

    def owned_by(self, rank: int) -> set[int]:
        """The `id` of every parameter that a rank updates."""
        return {
            id(p)
            for bucket in self.buckets
            for p, owner in zip(bucket.parameters, bucket.owners, strict=True)
            if owner == rank
        }

    def loads(self) -> list[int]:
        """How many elements each rank updates."""
        return list(self._loads)

    def bytes_per_step(self) -> dict[str, int]:
        """What a rank gives to each kind of collective in a step, of gradients and parameters."""
        whole = sum(bucket.gradient_bytes for bucket in self.buckets)
        return {"reduce_scatter": whole, "all_gather": whole // self.ranks.size}

    def begin(self) -> None:
        """Before a step's first pass: gradients are zero."""
        for bucket in self.buckets:
            bucket.attach()
        self._started = []
        self._missing = [len(bucket.parameters) for bucket in self.buckets]

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Around this rank's last backward pass of a step: sums start as gradients come."""
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, bucket in enumerate(self.buckets)
            for p in bucket.parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """Sum what is left, wait for all, and give owners their gradients."""
        self._start(len(self.buckets))
        for number, transfer in enumerate(self._started):
            transfer.wait()
            self._started[number] = DONE  # a back end's own memory goes with its transfer
        for bucket in self.buckets:
            bucket.detach()

    def norm(self, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
        """The norm () of what all ranks have of gradients; `sums` (F,) become those of all."""
        return norm_of_ranks(self.ranks, gradients, sums)

    def gather(self) -> None:
        """After the update: every rank has all parameters as their owners left them."""
        for transfer in [bucket.gather() for bucket in self.buckets]:
            transfer.wait()

    def _arrived(self, number: int, _: Tensor) -> None:
        """A parameter of a bucket has its whole gradient; so have those of buckets before."""
        if number < len(self._started):
            raise RuntimeError("a gradient came when its bucket was summed already")
        self._missing[number] -= 1
        self._start(number + (self._missing[number] == 0))

    def _start(self, count: int) -> None:
        """Start the sums of the first `count` buckets that have not started."""
        for bucket in self.buckets[len(self._started) : count]:
            self._started.append(bucket.reduce())


class JoinedParallel:
    """Parameters that are summed over different ranks, as one set; the first one's have all ranks.

    Experts that ranks divide are the second set: they are summed over those ranks alone that have
    the same ones.
    """

    def __init__(self, *sets: DataParallel) -> None:
        self.sets = sets
        self.ranks, self.data = sets[0].ranks, sets[0].data

    def begin(self) -> None:
        """Before a step's first pass: gradients are zero."""
        for parallel in self.sets:
            parallel.begin()

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Around this rank's last backward pass of a step: sums start as gradients come."""
        with ExitStack() as stack:
            for parallel in self.sets:
                stack.enter_context(parallel.last_pass())
            yield

    def finish(self) -> None:
        """Sum what is left, wait for all, and give owners their gradients."""
        for parallel in self.sets:
            parallel.finish()

    def norm(self, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
        """The norm () of what all ranks have of gradients; `sums` (F,) become those of all."""
        return norm_of_ranks(self.ranks, gradients, sums)

    def gather(self) -> None:
        """After the update: every rank has all its parameters as their owners left them."""
        for parallel in self.sets:
            parallel.gather()


def norm_of_ranks(ranks: Ranks, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
    """The norm () of gradients of which one rank each has one; `sums` become those of all ranks."""
    norm = global_norm(list(gradients)) if gradients else sums.new_zeros(())
    everything = torch.cat((sums, norm.double().square().unsqueeze(0)))
    ranks.all_reduce(everything).wait()
    sums.copy_(everything[:-1])
    return everything[-1].sqrt().float()


def _bucketed(units: Sequence[Sequence[Tensor]], elements: int) -> list[list[Tensor]]:
    """Parameters of consecutive units in buckets of one dtype each."""
    open_: dict[torch.dtype, list[Tensor]] = {}
    closed: list[list[Tensor]] = []
    for unit in units:
        for p in unit:
            open_.setdefault(p.dtype, []).append(p)
        full = [t for t, members in open_.items() if sum(p.numel() for p in members) >= elements]
        closed += [open_.pop(dtype) for dtype in full]
    return [*closed, *open_.values()]


def _owners(sizes: Sequence[int], totals: list[int]) -> list[int]:
    """Which rank owns each parameter: the largest first, to the rank that has least.

    Of several, to the one that has least of earlier buckets: `totals`, to which these are added.
    """
    ranks = len(totals)
    loads, owners = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], totals[rank], rank))
        owners[index] = rank
        loads[rank] += sizes[index]
    for rank, load in enumerate(loads):
        totals[rank] += load
    return owners
