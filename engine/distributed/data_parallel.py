"""Data parallelism: gradients summed over ranks, updates divided among them.

Each rank computes some rows of a step, and every gradient is the sum over the ranks. Parameters are
divided into pieces, each of which one rank owns: it alone has the piece's optimizer state and moves
it; then all ranks receive it (ZeRO stage 1, Rajbhandari et al. 2020, arXiv 1910.02054).

Parameters lie in buckets of consecutive layers, gradients likewise: in a bucket first the part of
rank 0, then that of rank 1, all of one length. A parameter begins at a multiple of 256 elements,
and so does every part, so pieces are whole blocks of 8-bit optimizer states, and results are those
of whole parameters. The last ranks may own nothing but zeros, which stay zero. For optimizers that
work on matrices (`whole`) no parameter is cut: each lies in the part of one rank. A bucket takes
one reduce_scatter, which starts when backward has passed its layers and runs beside those that
follow, and one all_gather after the update. Buckets start in one order on all ranks, also on one
that has no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kernels.runtime.ranks import DONE, Ranks, Transfer
from kernels.vocabulary.shard import BLOCK
from models.memory.sharded_parameters import ParameterPiece
from optim.clip import global_norm

BUCKET_ELEMENTS = 1 << 22
"""From so many elements on a bucket takes no further layer. Where no parameter is cut there may be
more: a bucket is as long as N times the largest part of any rank, and with few it were padding."""


@dataclass(frozen=True, eq=False)
class OwnedPiece:
    """Elements of a parameter that one rank updates: `count` from `begin` on."""

    parameter: Tensor
    begin: int
    count: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.parameter.numel()


class GradientBucket:
    """Parameters of one dtype that are reduced together, and their memory.

    `padding` are zeros of a rank whose part holds nothing else, and their gradients are too.
    """

    def __init__(
        self, parameters: Sequence[Tensor], ranks: Ranks, loads: list[int], whole: bool = False
    ) -> None:
        """`loads` are the elements that ranks own in buckets before; those of this are added."""
        self.parameters = list(parameters)
        self._ranks = ranks
        sizes = [p.numel() for p in parameters]
        starts, self._part = (
            _laid_whole(sizes, loads) if whole else _laid_in_order(sizes, ranks.size)
        )
        self._starts = {id(p): start for p, start in zip(parameters, starts, strict=True)}
        first = parameters[0]
        size = self._part * ranks.size
        self._values, self._gradients = (
            torch.zeros(size, dtype=first.dtype, device=first.device) for _ in range(2)
        )
        self._reduced = torch.zeros_like(self._gradients[: self._part])
        self._views: list[Tensor] = []
        with torch.no_grad():
            for p, start in zip(parameters, starts, strict=True):
                own = slice(start, start + p.numel())
                self._values[own].copy_(p.detach().reshape(-1))
                p.data = self._values[own].view_as(p)
                self._views.append(self._gradients[own].view_as(p))
        self.own = [(piece, *self._owned(piece)) for piece in self.pieces_of(ranks.rank)]
        own = slice(ranks.rank * self._part, ranks.rank * self._part + min(self._part, BLOCK))
        self.padding = nn.Parameter(self._values[own])
        for rank in range(ranks.size):
            loads[rank] += sum(piece.count for piece in self.pieces_of(rank))

    def pieces_of(self, rank: int) -> list[OwnedPiece]:
        """What a rank updates."""
        first, last = rank * self._part, (rank + 1) * self._part
        pieces = []
        for p in self.parameters:
            start = self._starts[id(p)]
            begin, end = max(start, first), min(start + p.numel(), last)
            if begin < end:
                pieces.append(OwnedPiece(p, begin - start, end - begin))
        return pieces

    def _owned(self, piece: OwnedPiece) -> tuple[nn.Parameter, Tensor]:
        """What the optimizer moves for a piece of this rank, and its summed gradient.

        They have the form of the parameter where that is whole, and are flat else.
        """
        begin = self._starts[id(piece.parameter)] + piece.begin
        first = self._ranks.rank * self._part
        values = self._values[begin : begin + piece.count]
        summed = self._reduced[begin - first : begin - first + piece.count]
        if piece.count == piece.numel:
            values, summed = values.view_as(piece.parameter), summed.view_as(piece.parameter)
        return nn.Parameter(values), summed

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
        for p, gradient in zip(self.parameters, self._views, strict=True):
            p.grad = gradient

    def reduce(self) -> Transfer:
        """Start the sum over all ranks of this rank's part."""
        return self._ranks.reduce_scatter(self._reduced, self._gradients)

    def detach(self) -> None:
        """Give this rank's pieces the sums as gradients, and the parameters none."""
        for p in self.parameters:
            p.grad = None
        for _, owned, summed in self.own:
            owned.grad = summed
        if not self.own:
            self.padding.grad = self._reduced[: self.padding.numel()]

    def gather(self) -> Transfer:
        """Start to bring every piece from its owner."""
        begin = self._ranks.rank * self._part
        # The part is copied: not every back end reads and writes the same memory.
        return self._ranks.all_gather(self._values, self._values[begin:][: self._part].clone())


class DataParallel:
    """Sums the gradients of `units` over `ranks`, and hands out what owners updated.

    `units` are lists of parameters in the order in which backward reaches them. `data` are the
    ranks that the rows of a step are dealt to, by default the same; others share their batches.
    With `whole` no parameter is cut. A rank may own nothing. Raises `ValueError` where a parameter
    is in two units.
    """

    def __init__(
        self,
        ranks: Ranks,
        units: Sequence[Sequence[Tensor]],
        elements: int = BUCKET_ELEMENTS,
        data: Ranks | None = None,
        whole: bool = False,
    ) -> None:
        self.ranks, self.data = ranks, ranks if data is None else data
        loads = [0] * ranks.size
        if whole:
            largest = max((p.numel() for unit in units for p in unit), default=0)
            elements = max(elements, ranks.size * largest)
        self.buckets = [
            GradientBucket(members, ranks, loads, whole) for members in _bucketed(units, elements)
        ]
        self._bucket_of = {
            id(p): number for number, b in enumerate(self.buckets) for p in b.parameters
        }
        if len(self._bucket_of) != sum(len(unit) for unit in units):
            raise ValueError("a parameter is in two units")
        self._missing = [len(b.parameters) for b in self.buckets]
        self._started: list[Transfer] = []

    @property
    def own(self) -> list[tuple[OwnedPiece, nn.Parameter]]:
        """What this rank updates, and what of it its optimizer moves."""
        return [(piece, owned) for bucket in self.buckets for piece, owned, _ in bucket.own]

    def pieces_of(self, rank: int) -> list[OwnedPiece]:
        """What a rank updates."""
        return [piece for bucket in self.buckets for piece in bucket.pieces_of(rank)]

    def bytes_per_step(self) -> dict[str, int]:
        """What a rank gives to each kind of collective in a step, of gradients and parameters."""
        if self.ranks.size == 1:
            return {}
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

    def bytes_per_step(self) -> dict[str, int]:
        """What a rank gives to each kind of collective in a step, of gradients and parameters."""
        total = Counter[str]()
        for parallel in self.sets:
            total.update(parallel.bytes_per_step())
        return dict(total)

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


def named_pieces(
    parallel: DataParallel, names: Mapping[int, str], part: int = 0, parts: int = 1
) -> list[ParameterPiece]:
    """What this rank's optimizer moves; `names` are by the parameters' `id`.

    The parameters are number `part` of `parts` along their first dimension, as divided experts are.
    """
    pieces = []
    for piece, owned in parallel.own:
        first, *others = piece.parameter.shape
        whole = torch.Size((parts * first, *others))
        begin = part * piece.numel + piece.begin
        pieces.append(ParameterPiece(names[id(piece.parameter)], whole, begin, owned))
    return pieces


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


def _laid_in_order(sizes: Sequence[int], ranks: int) -> tuple[list[int], int]:
    """Where parameters begin that follow each other, and the length of a rank's part."""
    starts, filled = [], 0
    for size in sizes:
        starts.append(filled)
        filled += -(-size // BLOCK) * BLOCK
    return starts, -(-filled // (ranks * BLOCK)) * BLOCK


def _laid_whole(sizes: Sequence[int], totals: list[int]) -> tuple[list[int], int]:
    """Where parameters begin that each lie in the part of one rank, and a part's length.

    The largest goes first, to the rank that has least; of several, to the one that has least of
    earlier buckets (`totals`).
    """
    ranks = len(totals)
    loads, filled, at = [0] * ranks, [0] * ranks, [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], totals[rank], rank))
        at[index] = rank, filled[rank]
        loads[rank] += sizes[index]
        filled[rank] += -(-sizes[index] // BLOCK) * BLOCK
    part = max(filled)
    return [rank * part + offset for rank, offset in at], part
