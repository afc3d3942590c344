"""Weights as dense matrices, with the adapters where those join the products.

`decode` gives the weights of projections that read the same input, decoded one below the other into
reused scratch. Where adapters join the products, that is the matrix E of `kernels.linear.lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.linear.adapters import Adapters, pack
from kernels.linear.dora import RowScale, row_scale
from kernels.linear.int8 import Int8Weight, dequantize_int8
from kernels.linear.projection import (
    LastingWeights,
    Projection,
    QuantizedWeight,
    Weight,
    aligned,
    layout_of,
    spare_columns,
)
from kernels.nf4 import NF4Weight, dequantize
from kernels.nf4.dequantize_triton import dequantize_planar, nf4_dequantize
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch


@dataclass(frozen=True)
class Decoded:
    """The weights of a group as dense matrices, the adapters, and, where it was built, E.

    Valid until scratch of the same slot is asked for again. Without `adapters` each projection's
    own pair is multiplied by (on a CPU).
    """

    weights: list[Tensor]
    adapters: Adapters | None = None
    extended: Tensor | None = None
    _scales: list[RowScale | None] = field(default_factory=list)

    def row_scales(self, projections: Sequence[Projection]) -> tuple[RowScale | None, ...]:
        """DoRA's scale of each projection of the group, computed when it is first asked for."""
        if not self._scales:
            self._scales.extend(map(row_scale, self.weights, projections))
        return tuple(self._scales)

    def forward_matrix(self) -> Tensor:
        """Upper rows of E: what [x | x~ A^T] is multiplied by, transposed."""
        assert self.extended is not None and self.adapters is not None
        return self.extended[: self.adapters.b.shape[0]]

    def backward_matrix(self) -> Tensor:
        """Left columns of E: what [dz | P] is multiplied by."""
        assert self.extended is not None
        return self.extended[:, : self.weights[0].shape[1]]


def decode(
    projections: Sequence[Projection],
    dtype: torch.dtype,
    slot: str = "wide",
) -> Decoded:
    """The weights as dense matrices of `dtype`; quantised ones lie one below the other in scratch.

    A decoder block uses two slots, "wide" for the projections that read the block's input and
    "narrow" for the one that writes its output, so that a backward pass decodes each weight once
    for recompute and gradient together. Where the group's decoded weights stay in memory these are
    taken, in place of scratch.
    """
    if any(isinstance(p.weight, Tensor) for p in projections):
        weights = [_dense(p.weight, dtype) for p in projections]
        return Decoded(weights, join(projections, dtype, weights[0].device, slot))
    device, columns = projections[0].weight.device, int(projections[0].weight.shape[1])
    layout, spare = layout_of(projections), spare_columns(projections, device)
    whole = lasting_matrix(projections, dtype)
    if whole is None:
        whole = scratch(f"decoded.{slot}", _shape(projections, device), dtype, device)
        weights = _decode_into(whole, projections)
    else:
        weights = _weights_of(whole, projections)
    if not spare:
        return Decoded(weights)
    extended = whole[:, : columns + spare]
    adapters = Adapters(
        layout, extended[layout.rows :, :columns], extended[: layout.rows, columns:]
    )
    pack(projections, adapters)
    return Decoded(weights, adapters, extended)


def lasting_weights(projections: Sequence[Projection], dtype: torch.dtype) -> LastingWeights:
    """The weights of a group of quantised projections, decoded to stay in memory."""
    device = projections[0].weight.device
    whole = torch.empty(_shape(projections, device), dtype=dtype, device=device)
    _decode_into(whole, projections)
    return LastingWeights(whole, len(projections))


def _shape(projections: Sequence[Projection], device: torch.device) -> tuple[int, int]:
    """Rows and pitch of the matrix that a group is decoded into."""
    columns, rows = int(projections[0].weight.shape[1]), layout_of(projections).rows
    spare = spare_columns(projections, device)
    return rows + spare, aligned(columns + spare) if spare else columns


def _weights_of(whole: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """The weights that lie one below the other in the matrix that a group is decoded into."""
    columns, layout = int(projections[0].weight.shape[1]), layout_of(projections)
    return [
        whole[first : first + out, :columns]
        for first, out in zip(layout.first, layout.outs, strict=True)
    ]


def _decode_into(whole: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    weights = _weights_of(whole, projections)
    for projection, out in zip(projections, weights, strict=True):
        assert not isinstance(projection.weight, Tensor)
        decode_weight(projection.weight, whole.dtype, out=out)
    return weights


def lasting_matrix(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """The decoded weights of a group one below the other, where they stay in memory."""
    lasting = projections[0].lasting
    if lasting is None or lasting.members != len(projections) or lasting.matrix.dtype != dtype:
        return None
    return lasting.matrix


def join(
    projections: Sequence[Projection], dtype: torch.dtype, device: torch.device, slot: str
) -> Adapters | None:
    """The group's adapters alone, in scratch; None where there are none, or where none are joined.

    For weights that stay as they are: dense ones, and codes that are multiplied by directly.
    """
    layout = layout_of(projections)
    if not spare_columns(projections, device):
        return None
    columns = int(projections[0].weight.shape[1])
    pitch = aligned(columns)
    flat = scratch(f"adapters.{slot}", (layout.spare * (pitch + layout.rows),), dtype, device)
    a, b = flat.split((layout.spare * pitch, layout.spare * layout.rows))
    adapters = Adapters(
        layout, a.view(layout.spare, pitch)[:, :columns], b.view(layout.rows, layout.spare)
    )
    pack(projections, adapters)
    return adapters


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else decode_weight(weight, dtype)


def decode_weight(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A quantised weight as a dense matrix (out, in) of `dtype`, in `out` if given.

    The rows of `out` may lie apart.
    """
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, dtype, out=out)
    if dtype == torch.float64:  # NF4 values are fp32 by definition; fp64 is for gradient checks
        wide = decode_weight(weight, torch.float32).double()
        return wide if out is None else out.copy_(wide)
    if out is not None and not out.is_contiguous():
        if isinstance(weight, PlanarNF4Weight) and use_triton(out):
            dequantize_planar(weight, out)
            return out
        return out.copy_(decode_weight(weight, dtype))
    if isinstance(weight, NF4Weight) and weight.device.type != "cuda":
        return dequantize(weight, dtype, out=out)
    return nf4_dequantize(weight, dtype, out=out)
