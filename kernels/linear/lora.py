"""Linear projections that share an input: plain, LoRA, DoRA and QLoRA.

For projections i with weight W_i (out_i, in), bias b_i and adapter A_i (r, in), B_i (out_i, r):

    z_i = x W_i^T + s_i (x~ A_i^T) B_i^T,     x~ = dropout(x),     y_i = c_i * z_i + b_i

c_i is 1 but for DoRA (`kernels.linear.dora`). W_i may be NF4 or 8-bit rows: it is decoded into
reused scratch and never saved. `kernels.linear.lora_backward` has the gradients.

On a GPU the adapters of a group are two joint matrices (`kernels.linear.adapters`) a, all A_i one
below the other, and b, the s_i B_i on a diagonal, so that x~ a^T is one skinny product. Beside
decoded weights they form one matrix

    [ W_1  s_1 B_1            ]
    [ W_2            s_2 B_2  ]        E (sum out + spare, in + spare)
    [ A_1                     ]
    [ A_2                     ]

so that [x | x~ a^T] times the upper rows of E is every z_i in one product. x lies in a matrix with
spare columns (`Columns`) if whoever made it foresaw that, as norms and SwiGLU do in a decoder
block. Else the narrower side decides: x is copied into such a matrix where it is narrower than the
outputs, and where it is not, x~ a^T b^T is added to them by a product of its own.

On a CPU, where decoding wants contiguous rows, each adapter's products are added by themselves.
Source: Hu et al. 2021 (LoRA, arXiv 2106.09685); Dettmers et al. 2023 (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.dropout import Seed
from kernels.linear.adapters import Adapters, AdapterSaved, Gradients
from kernels.linear.columns import (
    Columns,
    input_columns,
    matrix_of,
    output_columns,
    stacked,
)
from kernels.linear.decode import Decoded, decode, join
from kernels.linear.dense import dense_product
from kernels.linear.dora import RowScale
from kernels.linear.lora_backward import adapter_input, project_backward, split_ranks
from kernels.linear.observer import input_observer
from kernels.linear.projection import Projection
from kernels.nf4.matmul import fused_pays, nf4_linear
from kernels.nf4.planar import PlanarNF4Weight

__all__ = ["Gradients", "lora_linear", "lora_qkv", "project", "project_backward"]


def project(
    x: Tensor | Columns,
    projections: Sequence[Projection],
    seed: Seed | None = None,
    decoded: Decoded | None = None,
    slot: str = "wide",
    *,
    spare: bool = True,
) -> tuple[Columns, AdapterSaved]:
    """y_i (N, out_i) for x (N, in), as column blocks of one matrix, and what backward reads.

    `seed` None means no dropout (evaluation). `decoded` are weights already at hand; without them
    few rows on a GPU are multiplied by the codes directly (`kernels.nf4.matmul`), and otherwise the
    weights are decoded into the scratch of `slot`. Without `spare` the outputs get no columns that
    only backward uses, for outputs whose memory holds no gradient later.
    """
    matrix = matrix_of(x)
    input_observer().linear(matrix, projections)
    ys = output_columns(matrix.shape[0], projections, matrix, spare=spare)
    scales: tuple[RowScale | None, ...] = (None,) * len(projections)
    if decoded is None and _without_decoding(matrix, projections):
        adapters = join(projections, matrix.dtype, matrix.device, slot)
        xa = adapter_input(matrix, projections, seed, adapters)
        _add_adapters(xa, projections, ys, adapters, 0.0)  # first, as in `_multiply`
        for y, projection in zip(ys.parts, projections, strict=True):
            assert isinstance(projection.weight, PlanarNF4Weight)
            nf4_linear(matrix, projection.weight, out=y, accumulate=xa is not None)
        _add_row_adapters(ys.parts, matrix, projections)
    else:
        decoded = decoded or decode(projections, matrix.dtype, slot)
        xa = adapter_input(matrix, projections, seed, decoded.adapters)
        _multiply(x, xa, projections, decoded, ys)
        scales = decoded.row_scales(projections)
    for y, projection, scale in zip(ys.parts, projections, scales, strict=True):
        if scale is not None:
            y.mul_(scale.scale)
        for adapter in projection.by_rows:
            adapter.rescale(y)
        if projection.bias is not None:
            y += projection.bias.to(y.dtype)
    return ys, AdapterSaved(xa, scales)


def _without_decoding(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether the fused NF4 product is the faster way for all of these."""
    return all(
        isinstance(p.weight, PlanarNF4Weight) and p.magnitude is None and fused_pays(x, p.weight)
        for p in projections
    )


def _multiply(
    x: Tensor | Columns,
    xa: Tensor | None,
    projections: Sequence[Projection],
    decoded: Decoded,
    ys: Columns,
) -> None:
    """ys = z_i, in one product where the weights lie one below the other."""
    if decoded.extended is not None and xa is not None:
        own = _with_spare(x, projections, ys)
        if own is not None:
            own.spare(xa.shape[1]).copy_(xa)
            extended = own.extended(xa.shape[1])
            torch.mm(extended, decoded.forward_matrix().T, out=ys.matrix)
            _add_row_adapters(ys.parts, matrix_of(x), projections)
            return
    matrix, joined = matrix_of(x), stacked(decoded.weights, 0)
    # An adapter's part is far smaller than the base's: added to a product that is rounded to 16
    # bits already it would mostly vanish, so there it comes first and the base is added to it.
    by_rows = any(projection.by_rows for projection in projections)
    first = (xa is not None or by_rows) and ys.matrix.itemsize == 2
    if first:
        if xa is None:
            ys.matrix.zero_()
        _add_adapters(xa, projections, ys, decoded.adapters, 0.0)
        _add_row_adapters(ys.parts, matrix, projections)
    if joined is not None:
        dense_product(matrix, joined, ys.matrix, add=first)
    else:
        for y, weight in zip(ys.parts, decoded.weights, strict=True):
            dense_product(matrix, weight, y, add=first)
    if not first:
        _add_adapters(xa, projections, ys, decoded.adapters)
        _add_row_adapters(ys.parts, matrix, projections)


def _with_spare(
    x: Tensor | Columns, projections: Sequence[Projection], ys: Columns
) -> Columns | None:
    """x with spare columns: its own, or a copy where that moves fewer bytes than adding to ys."""
    if isinstance(x, Columns):
        return x
    if x.shape[1] >= ys.width:
        return None
    own = input_columns(x, projections)
    if own is not None:
        own.matrix.copy_(x)
    return own


def _add_adapters(
    xa: Tensor | None,
    projections: Sequence[Projection],
    ys: Columns,
    adapters: Adapters | None,
    beta: float = 1.0,
) -> None:
    """ys = beta ys + the adapters' parts."""
    if xa is None:
        return
    if adapters is not None:
        torch.addmm(ys.matrix, xa, adapters.b.T, beta=beta, out=ys.matrix)
        return
    for y, projection, low in zip(ys.parts, projections, split_ranks(xa, projections), strict=True):
        if projection.lora_b is not None and low is not None:
            b, scale = projection.lora_b.to(y.dtype), projection.scale
            torch.addmm(y, low, b.T, beta=beta, alpha=scale, out=y)
        elif beta == 0.0:
            y.zero_()


def _add_row_adapters(ys: Sequence[Tensor], x: Tensor, projections: Sequence[Projection]) -> None:
    """Add the pairs for some rows to the outputs y_i (N, out_i) for x (N, in)."""
    for y, projection in zip(ys, projections, strict=True):
        for adapter in projection.by_rows:
            adapter.add_to(y, x)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], seed: Seed | None, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, saved = project(x, projections, seed, spare=False)
        ctx.save_for_backward(x, saved.low)
        ctx.projections, ctx.seed, ctx.params = projections, seed, params
        ctx.scales = saved.scales
        return tuple(y.contiguous() for y in ys.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        grads: Gradients = {}
        dx = project_backward(
            dys,
            x,
            ctx.projections,
            grads,
            seed=ctx.seed,
            saved=AdapterSaved(low, ctx.scales),
            need_dx=ctx.needs_input_grad[0],
        )
        return dx, None, None, *(grads.get(id(p)) for p in ctx.params)


def _parameters(projections: Sequence[Projection]) -> list[Tensor]:
    return [t for p in projections for t in p.trainable()]


def lora_linear(x: Tensor, projection: Projection, seed: Seed | None = None) -> Tensor:
    """One projection of x (N, in) -> (N, out); gradients for x, A, B, and W and b if wanted."""
    ys: tuple[Tensor, ...] = _Project.apply(x, (projection,), seed, *_parameters((projection,)))
    return ys[0]


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, seed: Seed | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three attention inputs of x (N, in) in one product each way."""
    group = (q, k, v)
    ys: tuple[Tensor, ...] = _Project.apply(x, group, seed, *_parameters(group))
    return ys[0], ys[1], ys[2]
