"""Projections that share an input, for few rows on a CPU.

`kernels.linear.lora` has the maths. Where the loops of `kernels.few_rows.product` read all weights
of a group, nothing is decoded; adapters' parts are then written first, and the products with the
weights added to them. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.few_rows.product import StoredWeight, multiply_rows, takes_rows, takes_weight
from kernels.linear.decode import lasting_matrix
from kernels.linear.lora import project
from kernels.linear.observer import is_observed
from kernels.linear.projection import Projection
from kernels.nf4.planar import PlanarNF4Weight


def project_rows(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """The outputs (N, sum of out_i) of x (N, in), without dropout: column blocks of one matrix."""
    whole = lasting_matrix(projections, x.dtype)
    weights = [p.weight for p in projections] if whole is None else [whole]
    stored = _stored(x, weights) if _is_plain(x, projections) else []
    if not stored:
        return project(x, projections, spare=False)[0].matrix
    widths = [p.out_features for p in projections]
    out = x.new_empty(x.shape[0], sum(widths))
    parts = out.split(widths, 1) if len(widths) > 1 else (out,)
    adds = any(p.lora_a is not None or p.by_rows for p in projections)
    if adds:
        for part, projection in zip(parts, projections, strict=True):
            _write_adapters(part, x, projection)
    multiply_rows(x, stored, parts if whole is None else (out,), add=adds)
    for part, projection in zip(parts, projections, strict=True):
        for pair in projection.by_rows:
            pair.rescale(part)
        if projection.bias is not None:
            part += projection.bias.to(part.dtype)
    return out


def multiply_head(x: Tensor, weight: StoredWeight) -> Tensor | None:
    """Logits (N, V) of x (N, H), or None where no loop computes them."""
    if not (takes_rows(x) and takes_weight(x, weight)):
        return None
    out = x.new_empty(x.shape[0], int(weight.shape[0]))
    multiply_rows(x, (weight,), (out,))
    return out


def _is_plain(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether nothing but products and low-rank pairs is asked for."""
    return takes_rows(x) and not is_observed() and all(p.magnitude is None for p in projections)


def _stored(x: Tensor, weights: Sequence[StoredWeight | PlanarNF4Weight]) -> list[StoredWeight]:
    """The weights, if there are loops for all of them; else none."""
    stored = list[StoredWeight]()
    for weight in weights:
        if isinstance(weight, PlanarNF4Weight) or not takes_weight(x, weight):
            return []
        stored.append(weight)
    return stored


def _write_adapters(out: Tensor, x: Tensor, projection: Projection) -> None:
    """out (N, out) = what the low-rank pairs add to the product."""
    a, b = projection.lora_a, projection.lora_b
    if a is None or b is None:
        out.zero_()
    else:
        low = x @ a.to(x.dtype).T
        torch.addmm(out, low, b.to(x.dtype).T, beta=0.0, alpha=projection.scale, out=out)
    for pair in projection.by_rows:
        pair.add_to(out, x)
