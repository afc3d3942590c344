"""The adapters of a group as two joint matrices, and their gradients.

    a = [ A_1 ]  (spare, in)      b = [ s_1 B_1          ]  (sum out, spare)
        [ A_2 ]                       [          s_2 B_2 ]

in the dtype of the products, zeros where no rank fills them (`GroupLayout`). One launch rounds and
joins the pairs of a group from the parameters themselves, so no copy in 16 bits outlives the
product that reads it and none can be out of date; one launch takes the gradients

    dA_i = rows of P^T x~,     dB_i = s_i times a block of dz^T (x~ A^T)

apart again. The s_i B_i are rounded once, from fp32 products. Source: Hu et al. 2021 (LoRA, arXiv
2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.adapters_triton import pack_triton, unpack_triton
from kernels.linear.dora import RowScale
from kernels.linear.projection import GroupLayout, Projection
from kernels.runtime.dispatch import use_triton

Gradients = dict[int, Tensor]
"""id of a trainable tensor -> its gradient."""


@dataclass(frozen=True)
class Adapters:
    """a (spare, in) and b (sum out, spare) of a group; their rows may lie apart."""

    layout: GroupLayout
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class AdapterSaved:
    """What the adapters of a group leave for backward.

    `low` is x~ A^T, (N, spare) or on a CPU (N, sum of ranks); None without adapters. `scales` are
    those of DoRA, one per projection, None where a projection has none.
    """

    low: Tensor | None
    scales: tuple[RowScale | None, ...]


def pairs_of(projections: Sequence[Projection]) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and scale of every projection that has an adapter, in the order of `blocks`."""
    return [
        (p.lora_a, p.lora_b, p.scale)
        for p in projections
        if p.lora_a is not None and p.lora_b is not None
    ]


def pack(projections: Sequence[Projection], adapters: Adapters) -> None:
    """Write every element of `adapters`."""
    pairs = pairs_of(projections)
    if use_triton(adapters.a):
        pack_triton(pairs, adapters.layout, adapters.a, adapters.b)
    else:
        _pack_reference(pairs, adapters)


def _pack_reference(pairs: Sequence[tuple[Tensor, Tensor, float]], adapters: Adapters) -> None:
    layout = adapters.layout
    adapters.a.zero_()
    adapters.b.zero_()
    for (a, b, scale), (_, rows, columns) in zip(pairs, layout.blocks(), strict=True):
        adapters.a[columns].copy_(a.detach())
        adapters.b[rows, columns].copy_(b.detach() * scale)


def unpack(
    da: Tensor | None,
    db: Tensor | None,
    projections: Sequence[Projection],
    layout: GroupLayout,
    grads: Gradients,
) -> None:
    """Add the gradients of the pairs that want one to `grads`.

    `da` (spare, in) and `db` (sum out, spare), the latter not scaled yet; None where none of its
    kind is wanted.
    """
    pairs = pairs_of(projections)
    like = da if da is not None else db
    if like is None:
        return
    gradients: Sequence[tuple[Tensor | None, Tensor | None]]
    if da is not None and db is not None and use_triton(like):
        gradients = unpack_triton(da, db, pairs, layout)
    else:
        gradients = _unpack_reference(da, db, pairs, layout)
    for (a, b, _), (own_da, own_db) in zip(pairs, gradients, strict=True):
        if own_da is not None and a.requires_grad:
            grads[id(a)] = own_da
        if own_db is not None and b.requires_grad:
            grads[id(b)] = own_db


def _unpack_reference(
    da: Tensor | None,
    db: Tensor | None,
    pairs: Sequence[tuple[Tensor, Tensor, float]],
    layout: GroupLayout,
) -> list[tuple[Tensor | None, Tensor | None]]:
    gradients: list[tuple[Tensor | None, Tensor | None]] = []
    for (a, b, scale), (_, rows, columns) in zip(pairs, layout.blocks(), strict=True):
        wide = torch.promote_types(b.dtype, torch.float32)
        gradients.append(
            (
                None if da is None else da[columns].to(a.dtype, copy=True),
                None if db is None else (db[rows, columns].to(wide) * scale).to(b.dtype),
            )
        )
    return gradients
