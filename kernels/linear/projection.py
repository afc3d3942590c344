"""Projection, the operand of every linear map, and its decoded weight.

A `Projection` is plain, LoRA, DoRA or QLoRA: a weight that is dense or quantised, an optional bias,
an optional LoRA pair and an optional magnitude. `decode` gives the weights of projections that read
the same input, decoded one below the other into reused scratch. On a GPU their adapters are part of
that matrix (see `kernels.linear.lora`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.int8 import Int8Weight, dequantize_int8
from kernels.nf4 import NF4Weight, dequantize
from kernels.nf4.dequantize_triton import dequantize_planar, nf4_dequantize
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch

QuantizedWeight = NF4Weight | PlanarNF4Weight | Int8Weight
Weight = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Projection:
    """One linear map: `weight` (out, in) dense or quantised, optional bias (out,) and LoRA pair.

    `magnitude` (out,) makes it DoRA.
    """

    weight: Weight
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def trainable(self) -> list[Tensor]:
        """The tensors of this projection that want a gradient, in a fixed order."""
        tensors = (self.weight, self.bias, self.lora_a, self.lora_b, self.magnitude)
        return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


@dataclass(frozen=True)
class Decoded:
    """The weights of a group as dense matrices, and, where it was built, E of `linear.lora`.

    Valid until scratch of the same slot is asked for again.
    """

    weights: list[Tensor]
    extended: Tensor | None = None

    def forward_matrix(self) -> Tensor:
        """Upper rows of E: what [x | x~ A^T] is multiplied by, transposed."""
        assert self.extended is not None
        return self.extended[: sum(w.shape[0] for w in self.weights)]

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
    for recompute and gradient together.
    """
    quantized = [p.weight for p in projections if not isinstance(p.weight, Tensor)]
    if len(quantized) < len(projections):
        return Decoded([_dense(p.weight, dtype) for p in projections])
    device, columns = quantized[0].device, quantized[0].shape[1]
    ranks = [0 if p.lora_a is None else int(p.lora_a.shape[0]) for p in projections]
    rows = sum(w.shape[0] for w in quantized)
    extend = sum(ranks) > 0 and _extends(device)
    extra = sum(ranks) if extend else 0
    # Rows of E start on 16 bytes, which wide stores and the tensor cores' copies need.
    pitch = -(-(columns + extra) // 8) * 8 if extend else columns
    whole = scratch(f"decoded.{slot}", (rows + extra, pitch), dtype, device)
    weights, row = [], 0
    for weight in quantized:
        part = whole[row : row + weight.shape[0], :columns]
        weights.append(decode_weight(weight, dtype, out=part))
        row += weight.shape[0]
    if not extend:
        return Decoded(weights)
    extended = whole[:, : columns + extra]
    _fill_adapters(extended, projections, ranks, rows, columns)
    return Decoded(weights, extended)


def _extends(device: torch.device) -> bool:
    """Whether adapters become part of the base products here; a CPU decodes contiguous rows."""
    return device.type == "cuda"


def _fill_adapters(
    extended: Tensor, projections: Sequence[Projection], ranks: list[int], rows: int, columns: int
) -> None:
    """Write s_i B_i and A_i into E, and zeros left and right of the former."""
    extended[:rows, columns:].zero_()
    row = low = 0
    for projection, rank in zip(projections, ranks, strict=True):
        a, b, height = projection.lora_a, projection.lora_b, projection.out_features
        if a is not None and b is not None:
            target = extended[row : row + height, columns + low : columns + low + rank]
            target.copy_(b).mul_(projection.scale)
            extended[rows + low : rows + low + rank, :columns].copy_(a)
        row, low = row + height, low + rank


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


def output_columns(
    rows: int, projections: Sequence[Projection], like: Tensor
) -> tuple[Tensor, ...]:
    """Uninitialised column blocks (rows, out_i) of one matrix, with spare columns for P."""
    widths = [p.out_features for p in projections]
    spare = sum(0 if p.lora_a is None else int(p.lora_a.shape[0]) for p in projections)
    whole = like.new_empty(rows, sum(widths) + (spare if _extends(like.device) else 0))
    parts: tuple[Tensor, ...] = whole[:, : sum(widths)].split(widths, 1)
    return parts
