"""Linear maps, one per expert, over rows sorted by expert.

Row m belongs to expert e where offsets[e] <= m < offsets[e + 1]. With weight W_e (out, in) and
adapter A_e (r, in), B_e (out, r) of every expert:

    y_m = W_e x_m + s B_e (A_e x~_m),     x~ = dropout(x)
    dx_m = W_e^T dy_m + dropout(A_e^T P_m),   P_m = s B_e^T dy_m
    dW_e = sum_m dy_m x_m^T,   dA_e = sum_m P_m x~_m^T,   dB_e = s sum_m dy_m (A_e x~_m)^T

The product B_e A_e is never formed. Two primitives carry all of it: `grouped_matmul` (either way
round) and `grouped_outer`. The reference decodes a quantised weight one expert at a time; the
Triton product decodes it between memory and tensor core, if it is in the planar order
(`planar_experts`), and for many rows the library's product may take all experts decoded at once
(`grouped_choice`). None saves a decoded weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed, dropout
from kernels.linear.adapters import Gradients
from kernels.linear.decode import decode_weight
from kernels.linear.observer import input_observer, is_observed
from kernels.linear.projection import Weight
from kernels.moe import grouped_matmul_triton
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_choice import multiply_nf4
from kernels.moe.grouped_library import ExpertProduct
from kernels.nf4 import NF4Weight, dequantize_rows
from kernels.nf4.dequantize_triton import dequantize_reference
from kernels.nf4.planar import PlanarNF4Weight, to_planar
from kernels.runtime.device import architecture
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch
from kernels.runtime.simulation import equal_parts_by, simulation

ExpertWeights = Tensor | NF4Weight | PlanarNF4Weight | tuple[Weight, ...]
"""(E, out, in) dense or NF4, or one (out, in) dense or quantised weight per expert."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows sorted by expert: expert e has rows offsets[e] to offsets[e + 1] of `rows`.

    `offsets` (E + 1,) int32 stays on the device; `bounds` reads it to the host.
    """

    offsets: Tensor
    rows: int

    @classmethod
    def from_sorted(cls, experts: Tensor, count: int) -> Groups:
        """From the expert (M,) of every row, ascending; no host read."""
        edges = torch.arange(count + 1, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, edges, out_int32=True)
        return cls(offsets, experts.shape[0])

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.offsets.shape[0] - 1

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Expert and first row of every tile of a Triton product."""
        return grouped_matmul_triton.tile_table(self.offsets, self.rows)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The offsets; a simulation asks for all experts equally often."""
        if simulation() is not None:
            return tuple(self.rows * edge // self.count for edge in range(self.count + 1))
        return tuple(int(offset) for offset in self.offsets.tolist())

    @cached_property
    def filled(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of every expert that has rows."""
        parts = enumerate(pairwise(self.bounds))
        return [(expert, slice(first, last)) for expert, (first, last) in parts if first < last]

    def alike(self) -> Iterable[tuple[int, slice]]:
        """`filled`, for work on one expert after the other that leaves no memory."""
        return equal_parts_by(lambda one: one[1].stop - one[1].start, self.filled)


@dataclass(frozen=True, eq=False)
class ExpertRowAdapter:
    """Pairs A (E, r, in), B (E, out, r) for the tokens that `mine` (N,) marks, for generation."""

    mine: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def add_to(self, y: Tensor, x: Gathered, groups: Groups, tokens: Tensor) -> None:
        """Add the pairs' part to y (M, out) of rows x (M, in), which are those of `tokens` (M,)."""
        index = torch.nonzero(self.mine.index_select(0, tokens)).squeeze(1)
        rows = torch.arange(groups.rows, device=index.device, dtype=groups.offsets.dtype)
        experts = torch.searchsorted(groups.offsets[1:], rows, right=True).index_select(0, index)
        own = Groups.from_sorted(experts, groups.count)
        source = index if x.rows is None else x.rows.index_select(0, index)
        low = grouped_matmul(Gathered(x.matrix, source), self.lora_a.to(y.dtype), own)
        part = grouped_matmul(low, self.lora_b.to(y.dtype), own, scale=self.scale)
        y.index_add_(0, index, part)


@dataclass(frozen=True)
class ExpertProjection:
    """One linear map in E versions, with a LoRA pair (E, r, in), (E, out, r) or without.

    `by_rows` are pairs for some tokens.
    """

    weight: ExpertWeights
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    by_rows: tuple[ExpertRowAdapter, ...] = ()

    @property
    def out_features(self) -> int:
        return weight_shape(self.weight)[1]

    def trainable(self) -> list[Tensor]:
        """The tensors of this projection that want a gradient, in a fixed order."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        tensors = (*weights, self.lora_a, self.lora_b)
        return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def weight_shape(weight: ExpertWeights) -> tuple[int, int, int]:
    """(E, out, in)."""
    if isinstance(weight, tuple):
        out, size = weight[0].shape
        return len(weight), int(out), int(size)
    count, out, size = weight.shape
    return int(count), int(out), int(size)


def planar_experts(weight: NF4Weight) -> PlanarNF4Weight:
    """An NF4 weight (E, out, in) in the planar order, as the Triton product reads it.

    Raises ValueError unless rows hold whole blocks of 64.
    """
    count, out, size = weight_shape(weight)
    planar = to_planar(replace(weight, shape=(count * out, size)))
    return replace(planar, shape=(count, out, size))


def expert_weight(weight: ExpertWeights, expert: int, dtype: torch.dtype) -> Tensor:
    """W_e (out, in) in `dtype`; a decoded one is valid until the next call."""
    count, out, size = weight_shape(weight)
    if isinstance(weight, Tensor):
        return weight[expert].to(dtype)
    if isinstance(weight, PlanarNF4Weight):
        flat = replace(weight, shape=(count * out, size))
        return dequantize_reference(flat, dtype)[expert * out : (expert + 1) * out]
    if isinstance(weight, tuple):
        one = weight[expert]
        if isinstance(one, Tensor):
            return one.to(dtype)
        decoded = scratch("dequantized.expert", (out, size), dtype, one.device)
        return decode_weight(one, dtype, out=decoded)
    if dtype == torch.float64:  # NF4 values are fp32 by definition; fp64 is for gradient checks
        return dequantize_rows(weight, expert, expert + 1, torch.float32).squeeze(0).double()
    decoded = scratch("dequantized.expert", (out, size), dtype, weight.device)
    return dequantize_rows(weight, expert, expert + 1, dtype, out=decoded).squeeze(0)


def _in_one_launch(x: Tensor, weight: ExpertWeights) -> bool:
    """Whether the Triton product takes these.

    fp32 on a GPU is what libraries multiply best, and before sm_80 Triton uses no tensor core.
    """
    if not use_triton(x) or not isinstance(weight, Tensor | PlanarNF4Weight):
        return False
    return not x.is_cuda or (x.dtype != torch.float32 and architecture(x.device) >= 80)


def grouped_matmul(
    x: Tensor | Gathered,
    weight: ExpertWeights,
    groups: Groups,
    *,
    transpose: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """scale * W_e x_m for every row m, (M, out); W_e^T x_m, (M, in), with `transpose`.

    x has M rows. `out` (M, out), rows of any stride, is written, or added to with `accumulate`. On
    a GPU 16-bit rows times a dense (E, out, in) or a planar NF4 weight are one launch, or a planar
    weight is decoded for the library (`grouped_choice`); other weights, and fp32, go expert by
    expert.
    """
    x = Gathered.of(x)
    if out is None:
        out_features = weight_shape(weight)[2 if transpose else 1]
        out = grouped_matmul_triton.aligned_empty((groups.rows, out_features), x.matrix)
        accumulate = False
    if _in_one_launch(x.matrix, weight):
        assert isinstance(weight, Tensor | PlanarNF4Weight)

        def fused() -> None:
            grouped_matmul_triton.matmul(
                x,
                weight,
                groups.offsets,
                groups.tiles,
                out,
                transpose=transpose,
                accumulate=accumulate,
                scale=scale,
            )

        if isinstance(weight, Tensor):
            fused()
        else:
            product = ExpertProduct(x, weight, groups.offsets, out, transpose, accumulate, scale)
            multiply_nf4(product, fused)
        return out
    for expert, part in groups.alike():
        dense = expert_weight(weight, expert, x.matrix.dtype)
        right, target = dense if transpose else dense.T, out[part]
        target.addmm_(x.part(part), right, beta=float(accumulate), alpha=scale)
    return out


def grouped_outer(
    a: Tensor | Gathered, b: Tensor | Gathered, groups: Groups, *, scale: float = 1.0
) -> Tensor:
    """scale * sum over the rows m of expert e of a_m b_m^T: (E, P, Q); zero without rows.

    a has M rows of width P, b of width Q.
    """
    a, b = Gathered.of(a), Gathered.of(b)
    if _in_one_launch(a.matrix, a.matrix):
        return grouped_matmul_triton.outer(a, b, groups.offsets, scale)
    out = a.matrix.new_zeros(groups.count, a.matrix.shape[1], b.matrix.shape[1])
    for expert, part in groups.alike():
        torch.mm(a.part(part).T, b.part(part), out=out[expert])
    return out if scale == 1.0 else out.mul_(scale)


def _dropped(x: Gathered, projections: Sequence[ExpertProjection], seed: Seed | None) -> Gathered:
    """x~; gathered first where dropout is on."""
    p = max(projection.dropout for projection in projections)
    return x if seed is None or p <= 0.0 else Gathered(dropout(x.all(), p, seed))


def grouped_project(
    x: Tensor | Gathered,
    projections: Sequence[ExpertProjection],
    groups: Groups,
    *,
    seed: Seed | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y (M, sum out_i), column blocks of one matrix, and A x~ (M, r_i) of every projection.

    x has M rows; `seed` None means no dropout. `tokens` (M,) are the rows' tokens, which pairs for
    some tokens need.
    """
    x, widths = Gathered.of(x), [projection.out_features for projection in projections]
    if is_observed():
        for expert, rows in groups.filled:
            for projection in projections:
                input_observer().expert(x.part(rows), expert, projection.weight)
    y = x.matrix.new_empty(groups.rows, sum(widths))
    lows = adapter_inputs(x, projections, groups, seed=seed)
    for part, projection, low in zip(torch.split(y, widths, 1), projections, lows, strict=True):
        grouped_matmul(x, projection.weight, groups, out=part)
        if low is not None and projection.lora_b is not None:
            b, scale = projection.lora_b, projection.scale
            grouped_matmul(low, b, groups, out=part, accumulate=True, scale=scale)
        for adapter in projection.by_rows:
            assert tokens is not None
            adapter.add_to(part, x, groups, tokens)
    return y, lows


def adapter_inputs(
    x: Tensor | Gathered,
    projections: Sequence[ExpertProjection],
    groups: Groups,
    *,
    seed: Seed | None = None,
) -> list[Tensor | None]:
    """A_e x~ (M, r) of every projection, None where it has no adapter."""
    dropped = _dropped(Gathered.of(x), projections, seed)
    return [
        None if p.lora_a is None else grouped_matmul(dropped, p.lora_a, groups) for p in projections
    ]


def grouped_project_backward(
    dy: Tensor | Gathered,
    x: Tensor | Gathered,
    projections: Sequence[ExpertProjection],
    groups: Groups,
    grads: Gradients,
    *,
    seed: Seed | None = None,
    lows: list[Tensor | None] | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """Adds every wanted parameter gradient to `grads` and returns dx (M, in), in sorted order.

    dy has M rows of width sum out_i. `lows` is the second value of `grouped_project`, computed
    again when None.
    """
    dy, x = Gathered.of(dy), Gathered.of(x)
    if lows is None:
        lows = adapter_inputs(x, projections, groups, seed=seed)
    dropped = _dropped(x, projections, seed)
    dx, low_dx = None, None
    dys = dy.columns([projection.out_features for projection in projections])
    for part, projection, low in zip(dys, projections, lows, strict=True):
        _weight_gradient(part, x, projection.weight, groups, grads)
        if need_dx:
            dx = _add_transposed(dx, part, projection.weight, groups)
        a, b, scale = projection.lora_a, projection.lora_b, projection.scale
        if a is None or b is None or low is None:
            continue
        if b.requires_grad:
            grads[id(b)] = grouped_outer(part, low, groups, scale=scale).to(b.dtype).contiguous()
        low_dy = grouped_matmul(part, b, groups, transpose=True, scale=scale)
        if a.requires_grad:
            grads[id(a)] = grouped_outer(low_dy, dropped, groups).to(a.dtype).contiguous()
        if need_dx and dropped is x:
            dx = _add_transposed(dx, low_dy, a, groups)
        elif need_dx:
            low_dx = _add_transposed(low_dx, low_dy, a, groups)
    if dx is not None and low_dx is not None:
        dx += _dropped(Gathered(low_dx), projections, seed).matrix
    return dx


def _add_transposed(
    out: Tensor | None, dy: Tensor | Gathered, weight: ExpertWeights, groups: Groups
) -> Tensor:
    return grouped_matmul(dy, weight, groups, transpose=True, out=out, accumulate=out is not None)


def _weight_gradient(
    dy: Gathered, x: Gathered, weight: ExpertWeights, groups: Groups, grads: Gradients
) -> None:
    """dW: one (E, out, in), or one (out, in) for every expert of a tuple that has rows."""
    if isinstance(weight, Tensor):
        if weight.requires_grad:
            grads[id(weight)] = grouped_outer(dy, x, groups).to(weight.dtype).contiguous()
    elif isinstance(weight, tuple):
        for expert, part in groups.filled:
            one = weight[expert]
            if isinstance(one, Tensor) and one.requires_grad:
                grads[id(one)] = (dy.part(part).T @ x.part(part)).to(one.dtype)
