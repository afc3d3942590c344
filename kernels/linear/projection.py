"""Projection, the operand of every linear map, and groups of them.

A `Projection` is plain, LoRA, DoRA or QLoRA: a weight that is dense or quantised, an optional bias,
an optional LoRA pair and an optional magnitude. Projections that read the same input form a group.
On a GPU their adapters join the products with their weights (see `kernels.linear.lora`), and
`GroupLayout` says where each of them lies in the joint matrices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from kernels.linear.int8 import Int8Weight
from kernels.linear.row_adapters import RowAdapter
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import PlanarNF4Weight

QuantizedWeight = NF4Weight | PlanarNF4Weight | Int8Weight
Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, eq=False)
class LastingWeights:
    """Decoded weights of a group that stay: `matrix` is what `kernels.linear.decode` makes of them.

    It serves a group of `members` projections in its own dtype.
    """

    matrix: Tensor
    members: int


@dataclass(frozen=True)
class Projection:
    """One linear map: `weight` (out, in) dense or quantised, optional bias (out,) and LoRA pair.

    `magnitude` (out,) makes it DoRA. `lasting` are the decoded weights of its group, where they
    stay in memory; all projections of the group have the same. `by_rows` are pairs for some rows of
    the input, for generation.
    """

    weight: Weight
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None
    lasting: LastingWeights | None = None
    by_rows: tuple[RowAdapter, ...] = ()

    @cached_property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @cached_property
    def rank(self) -> int:
        """That of the adapter; 0 without one."""
        return 0 if self.lora_a is None else int(self.lora_a.shape[0])

    def trainable(self) -> list[Tensor]:
        """The tensors of this projection that want a gradient, in a fixed order."""
        tensors = (self.weight, self.bias, self.lora_a, self.lora_b, self.magnitude)
        return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


ALIGNED = 16
"""Elements on whose multiples rows, and the columns of each adapter, begin in joint matrices.

16-byte copies, which flash attention and the tensor cores' loads need, and wide stores, which
Triton makes only of pitches that it knows to be multiples of 16, then do not depend on the rank.
"""


def aligned(columns: int) -> int:
    """`columns` rounded up to whole `ALIGNED` elements."""
    return -(-columns // ALIGNED) * ALIGNED


def joins_adapters(device: torch.device) -> bool:
    """Whether adapters join the products with the weights: on a GPU, and where one is interpreted.

    A CPU decodes contiguous rows.
    """
    if device.type == "cuda":
        return True
    environment = os.environ
    interpreted = environment.get("ENGINE_INTERPRET") == "1"
    return interpreted and environment.get("ENGINE_REFERENCE") != "1"


@dataclass(frozen=True)
class GroupLayout:
    """Where the projections of a group lie among joint rows, and their adapters among columns.

    Projection i has the outputs `first[i]` to `first[i] + outs[i]`, and its adapter the columns
    `low[i]` to `low[i] + ranks[i]` of `spare`; those that no rank fills are zeros.
    """

    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    first: tuple[int, ...]
    low: tuple[int, ...]
    spare: int

    @property
    def rows(self) -> int:
        """The outputs of all projections."""
        return self.first[-1] + self.outs[-1]

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """Number, rows and columns of each adapter."""
        for index, rank in enumerate(self.ranks):
            if rank:
                first, low = self.first[index], self.low[index]
                yield index, slice(first, first + self.outs[index]), slice(low, low + rank)


@lru_cache(maxsize=1024)
def _layout(outs: tuple[int, ...], ranks: tuple[int, ...]) -> GroupLayout:
    first, low = [0], [0]
    for out, rank in zip(outs, ranks, strict=True):
        first.append(first[-1] + out)
        low.append(low[-1] + aligned(rank))
    return GroupLayout(outs, ranks, tuple(first[:-1]), tuple(low[:-1]), low[-1])


def layout_of(projections: Sequence[Projection]) -> GroupLayout:
    """The layout of a group."""
    return _layout(
        tuple([p.out_features for p in projections]), tuple([p.rank for p in projections])
    )


def spare_columns(projections: Sequence[Projection], device: torch.device) -> int:
    """Columns of the adapters of a group in its joint matrices; 0 where none joins the products."""
    spare = layout_of(projections).spare
    return spare if spare and joins_adapters(device) else 0
