"""Optimizer state: all moments in a few flat buffers.

A parameter of at least as many elements as `least` says owns rows of 256 in the 8-bit buffers, a
smaller one rows in the fp32 buffers. Rows never hold two parameters, so blocks are those that each
parameter would have alone. Everything a step changes is a tensor here, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.adamw8bit import ROW, ZERO_CODE, Moments, Piece
from kernels.adamw8bit.launch import FlatMoments, SegmentTable

SLAB_ROWS = 1024
"""Rows that the torch reference works on at once: its four fp32 slabs then fit a core's cache."""


LAYOUT_VERSION = 1
"""Raised when stored states change their meaning, so that an older file is refused."""


@dataclass(frozen=True)
class ParameterRows:
    """Where the moments of parameter `index` lie: `rows` rows from `row` of one kind of buffer."""

    index: int
    numel: int
    quantized: bool
    row: int
    rows: int


@dataclass(frozen=True)
class Slab:
    """A run of rows in one kind of buffer, and the pieces of parameters that own them."""

    quantized: bool
    row: int
    rows: int
    pieces: tuple[Piece, ...]


class FlatState:
    """Moments, absmax, step counts and fp32 masters of `params`, in their order."""

    def __init__(self, params: Sequence[Tensor], least: Sequence[int], masters: bool) -> None:
        device = params[0].device
        self.segments: list[ParameterRows] = []
        rows = {True: 0, False: 0}
        for index, param in enumerate(params):
            quantized = param.numel() >= least[index]
            count = -(-param.numel() // ROW)
            segment = ParameterRows(index, param.numel(), quantized, rows[quantized], count)
            self.segments.append(segment)
            rows[quantized] += count

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.m_codes = zeros(rows[True], ROW, dtype=torch.uint8).fill_(ZERO_CODE)
        self.v_codes = zeros(rows[True], ROW, dtype=torch.uint8)
        self.m_absmax = zeros(rows[True], dtype=torch.float32)
        self.v_absmax = zeros(rows[True], dtype=torch.float32)
        self.m_exact = zeros(rows[False], ROW, dtype=torch.float32)
        self.v_exact = zeros(rows[False], ROW, dtype=torch.float32)
        self.steps = zeros(len(params), dtype=torch.int64)
        self.skipped = zeros(dtype=torch.int64)
        self.masters: dict[int, Tensor] = {}
        if masters:
            narrow = (i for i, param in enumerate(params) if param.dtype != torch.float32)
            self.masters = {i: params[i].detach().float().view(-1) for i in narrow}

    def moments(self, slab: Slab) -> Moments:
        """Views of the slab's rows."""
        rows = slice(slab.row, slab.row + slab.rows)
        if slab.quantized:
            m_absmax, v_absmax = self.m_absmax[rows], self.v_absmax[rows]
            return Moments(self.m_codes[rows], self.v_codes[rows], m_absmax, v_absmax)
        return Moments(self.m_exact[rows], self.v_exact[rows])

    def scales(self, members: Sequence[int] | None = None) -> list[Tensor]:
        """The tensors that make the state, or these members', non-finite if an element is."""
        coarse, exact = (self.m_absmax, self.v_absmax), (self.m_exact, self.v_exact)
        if members is None:
            return [*coarse, *exact]
        return [
            tensor[first:last]
            for quantized, tensors in ((True, coarse), (False, exact))
            for first, last in self._stretches(members, quantized)
            for tensor in tensors
        ]

    def _stretches(self, members: Sequence[int], quantized: bool) -> list[tuple[int, int]]:
        """First and last + 1 of the rows of `members` in one kind of buffer, without gaps."""
        rows = sorted(
            (segment.row, segment.row + segment.rows)
            for segment in (self.segments[index] for index in members)
            if segment.quantized is quantized
        )
        joined: list[tuple[int, int]] = []
        for first, last in rows:
            if joined and joined[-1][1] == first:
                first = joined.pop()[0]
            joined.append((first, last))
        return joined

    def flat_moments(self) -> FlatMoments:
        """All buffers, for the kernels."""
        return FlatMoments(
            self.m_codes,
            self.v_codes,
            self.m_absmax,
            self.v_absmax,
            self.m_exact,
            self.v_exact,
            self.steps,
            self.skipped,
        )

    def table(self, groups: Sequence[int], members: Sequence[int] | None = None) -> SegmentTable:
        """The kernels' table of all parameters or some; they belong to these `groups`."""
        rows = [(segment.quantized, segment.row, segment.rows) for segment in self.segments]
        return SegmentTable(rows, groups, self.steps.device, members)

    def views(self, index: int) -> dict[str, Tensor]:
        """One parameter's own part of every buffer: flat, without padding, sharing memory."""
        segment = self.segments[index]
        rows = slice(segment.row, segment.row + segment.rows)
        named = {"step": self.steps[index]}
        m, v = self.m_exact, self.v_exact
        if segment.quantized:
            m, v = self.m_codes, self.v_codes
            named["exp_avg_absmax"] = self.m_absmax[rows]
            named["exp_avg_sq_absmax"] = self.v_absmax[rows]
        named["exp_avg"] = m[rows].view(-1)[: segment.numel]
        named["exp_avg_sq"] = v[rows].view(-1)[: segment.numel]
        if index in self.masters:
            named["master"] = self.masters[index]
        return named

    def adopt(self, earlier: FlatState) -> None:
        """Take over the state of the parameters that `earlier` had; they come first here too."""
        self.skipped.copy_(earlier.skipped)
        for index in range(len(earlier.segments)):
            theirs = earlier.views(index)
            for name, mine in self.views(index).items():
                mine.copy_(theirs[name])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state that holds anything, without copying.

        `layout` says what the rows belong to; without 8-bit rows, say, there are no codes.
        """
        layout = [LAYOUT_VERSION, ROW, *(segment.numel for segment in self.segments)]
        named = {
            "exp_avg.codes": self.m_codes,
            "exp_avg.absmax": self.m_absmax,
            "exp_avg.float32": self.m_exact,
            "exp_avg_sq.codes": self.v_codes,
            "exp_avg_sq.absmax": self.v_absmax,
            "exp_avg_sq.float32": self.v_exact,
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "layout": torch.tensor(layout, dtype=torch.int64),
        }
        named |= {f"master.{index}": master for index, master in self.masters.items()}
        return {name: tensor for name, tensor in named.items() if tensor.numel()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` returned. Raises ValueError, changing nothing, if unlike."""
        own = self.tensors()
        check_loadable("the optimiser state", own, tensors)
        if not torch.equal(own["layout"], tensors["layout"].cpu()):
            raise ValueError(
                "the optimiser state belongs to parameters of other sizes or has another layout: "
                f"it says {tensors['layout'].tolist()}, expected {own['layout'].tolist()}"
            )
        for name, mine in own.items():
            mine.copy_(tensors[name])


def least_8bit_sizes(groups: Sequence[Mapping[str, Any]], own: int) -> list[int]:
    """For each parameter the size from which on its moments take 8 bits: its group's, or `own`."""
    sizes = [(group.get("min_8bit_size", own), len(group["params"])) for group in groups]
    return [size for size, count in sizes for _ in range(count)]


def check_loadable(what: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `other` has the names, shapes and dtypes of `own`, all finite."""
    if own.keys() != other.keys():
        names = ", ".join(sorted(own.keys() ^ other.keys()))
        raise ValueError(f"{what}: these tensors are on one side only: {names}")
    for name, mine in own.items():
        theirs = other[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise ValueError(
                f"{what}: {name} is {theirs.dtype} {tuple(theirs.shape)}, "
                f"expected {mine.dtype} {tuple(mine.shape)}"
            )
        if not bool(torch.isfinite(theirs).all()):
            raise ValueError(f"{what}: {name} holds NaN or infinity")


def slabs(segments: Sequence[ParameterRows]) -> list[Slab]:
    """Cut the rows of `segments` into slabs of at most `SLAB_ROWS` rows without gaps."""
    cut: list[Slab] = []
    pieces: list[Piece] = []
    start = end = 0
    quantized = False

    def close() -> None:
        if pieces:
            cut.append(Slab(quantized, start, end - start, tuple(pieces)))
            pieces.clear()

    for segment in segments:
        done = 0
        while done < segment.rows:
            row = segment.row + done
            if segment.quantized != quantized or row != end or end - start >= SLAB_ROWS:
                close()
                quantized, start, end = segment.quantized, row, row
            take = min(segment.rows - done, SLAB_ROWS - (end - start))
            last = min(segment.numel, (done + take) * ROW)
            pieces.append(Piece(segment.index, done * ROW, last))
            end += take
            done += take
    close()
    return cut


def refuse_unusable(params: list[Tensor]) -> None:
    """Raise ValueError where a parameter cannot be updated in place through a flat view."""
    for index, param in enumerate(params):
        if not param.is_floating_point() or not param.is_contiguous():
            raise ValueError(
                f"parameter {index} ({param.dtype}, {tuple(param.shape)}) must be a contiguous "
                "floating-point tensor"
            )
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {index} is on {param.device}, parameter 0 on {params[0].device}; "
                "one optimiser updates one device"
            )
