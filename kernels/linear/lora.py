"""Linear projections that share an input: plain, LoRA, DoRA and QLoRA.

For projections i with weight W_i (out_i, in), bias b_i and adapter A_i (r, in), B_i (out_i, r):

    z_i = x W_i^T + s_i (x~ A_i^T) B_i^T,     x~ = dropout(x),     y_i = c_i * z_i + b_i

    P_i = s_i dz_i B_i,   dz_i = c_i * dy_i
    dx  = sum_i dz_i W_i + dropout(sum_i P_i A_i)
    dA_i = P_i^T x~,   dB_i = s_i dz_i^T (x~ A_i^T),   dW_i = dz_i^T x,   db_i = sum dy_i

c_i is 1 but for DoRA (`kernels.linear.dora`). W_i may be NF4 or 8-bit rows: it is decoded into
reused scratch and never saved. All A_i that read the same x form one skinny product.

On a GPU the adapter costs no pass of its own over inputs or outputs. The scratch is one matrix

    [ W_1  s_1 B_1            ]
    [ W_2            s_2 B_2  ]        E (sum out + sum r, in + sum r)
    [ A_1                     ]
    [ A_2                     ]

so that [x | x~ A^T] times the upper rows of E is every z_i in one product, and [dz | P] times its
left columns is dx. On a CPU, where decoding wants contiguous rows, the adapter's skinny products
are added instead. Source: Hu et al. 2021 (LoRA, arXiv 2106.09685); Dettmers et al. 2023 (QLoRA,
arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.dropout import Seed, dropout
from kernels.linear.dora import magnitude_gradient, row_scale
from kernels.linear.projection import Decoded, Projection, decode, output_columns
from kernels.nf4.matmul import fused_pays, nf4_linear
from kernels.nf4.planar import PlanarNF4Weight

Gradients = dict[int, Tensor]
"""id of a trainable tensor -> its gradient."""


def _stacked(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The one matrix of which `parts` are consecutive rows (dim 0) or columns (dim 1), if any."""
    first = parts[0]
    step = first.stride(dim)
    offset = first.storage_offset()
    for part in parts:
        same = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.stride() == first.stride()
            and part.shape[1 - dim] == first.shape[1 - dim]
            and part.storage_offset() == offset
        )
        if not same:
            return None
        offset += part.shape[dim] * step
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def project(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Seed | None = None,
    decoded: Decoded | None = None,
    slot: str = "wide",
) -> tuple[list[Tensor], Tensor | None]:
    """y_i (N, out_i) for x (N, in), as column blocks of one matrix, and x~ A^T (N, sum r).

    `seed` None means no dropout (evaluation). `decoded` are weights already at hand; without them
    few rows on a GPU are multiplied by the codes directly (`kernels.nf4.matmul`), and otherwise the
    weights are decoded into the scratch of `slot`.
    """
    xa = adapter_input(x, projections, seed)
    ys = list(output_columns(x.shape[0], projections, x))
    if decoded is None and _without_decoding(x, projections):
        for y, projection in zip(ys, projections, strict=True):
            assert isinstance(projection.weight, PlanarNF4Weight)
            nf4_linear(x, projection.weight, out=y)
        _add_adapters(xa, projections, ys)
    else:
        decoded = decoded or decode(projections, x.dtype, slot)
        _multiply(x, xa, projections, decoded, ys)
    for index, (y, projection) in enumerate(zip(ys, projections, strict=True)):
        if projection.magnitude is not None:
            assert decoded is not None
            y.mul_(row_scale(decoded.weights[index], projection).to(y.dtype))
        if projection.bias is not None:
            y += projection.bias.to(y.dtype)
    return ys, xa


def _without_decoding(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether the fused NF4 product is the faster way for all of these."""
    return all(
        isinstance(p.weight, PlanarNF4Weight) and p.magnitude is None and fused_pays(x, p.weight)
        for p in projections
    )


def _multiply(
    x: Tensor,
    xa: Tensor | None,
    projections: Sequence[Projection],
    decoded: Decoded,
    ys: Sequence[Tensor],
) -> None:
    """ys = z_i, in one product where the weights lie one below the other."""
    out, joined = _stacked(ys, 1), _stacked(decoded.weights, 0)
    assert out is not None
    if decoded.extended is not None and xa is not None:
        torch.mm(torch.cat((x, xa), 1), decoded.forward_matrix().T, out=out)
        return
    if joined is not None:
        torch.mm(x, joined.T, out=out)
    else:
        for y, weight in zip(ys, decoded.weights, strict=True):
            torch.mm(x, weight.T, out=y)
    _add_adapters(xa, projections, ys)


def _add_adapters(
    xa: Tensor | None, projections: Sequence[Projection], ys: Sequence[Tensor]
) -> None:
    for y, projection, low in zip(ys, projections, _split_ranks(xa, projections), strict=True):
        if projection.lora_b is not None and low is not None:
            y.addmm_(low, projection.lora_b.to(y.dtype).T, alpha=projection.scale)


def adapter_input(x: Tensor, projections: Sequence[Projection], seed: Seed | None) -> Tensor | None:
    """x~ A^T (N, sum of ranks) for all adapters on x, or None without adapters."""
    stacked = _stacked_a(projections, x.dtype)
    if stacked is None:
        return None
    return _dropped(x, projections, seed) @ stacked.T


def _stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    parts = [p.lora_a.to(dtype) for p in projections if p.lora_a is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dropped(x: Tensor, projections: Sequence[Projection], seed: Seed | None) -> Tensor:
    p = max(projection.dropout for projection in projections)
    return x if seed is None else dropout(x, p, seed)


def _split_ranks(joined: Tensor | None, projections: Sequence[Projection]) -> list[Tensor | None]:
    """Column blocks of (N, sum of ranks), one per projection, None where it has no adapter."""
    if joined is None:
        return [None] * len(projections)
    ranks = [0 if p.lora_a is None else int(p.lora_a.shape[0]) for p in projections]
    parts = joined.split(ranks, 1)
    return [part if rank else None for part, rank in zip(parts, ranks, strict=True)]


def project_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    *,
    seed: Seed | None = None,
    xa: Tensor | None = None,
    decoded: Decoded | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """Adds every wanted parameter gradient to `grads` and returns dx (N, in).

    `xa` is the second value of `project`, recomputed when None. With `need_dx=False` the products
    with W are skipped: nothing below needs a gradient.
    """
    if xa is None:
        xa = adapter_input(x, projections, seed)
    dora = any(p.magnitude is not None for p in projections)
    if decoded is None and (need_dx or dora):
        decoded = decode(projections, x.dtype)
    products, dzs = [], list(dys)
    for index, (dy, projection, low) in enumerate(
        zip(dys, projections, _split_ranks(xa, projections), strict=True)
    ):
        if projection.bias is not None and projection.bias.requires_grad:
            grads[id(projection.bias)] = dy.sum(0).to(projection.bias.dtype)
        if projection.magnitude is not None:
            assert decoded is not None
            dy = _magnitude_backward(dy, x, low, decoded.weights[index], projection, grads)
            dzs[index] = dy
        if isinstance(projection.weight, Tensor) and projection.weight.requires_grad:
            grads[id(projection.weight)] = (dy.T @ x).to(projection.weight.dtype)
        if projection.lora_b is None or low is None:
            continue
        products.append((dy @ projection.lora_b.to(dy.dtype)).mul_(projection.scale))
        if projection.lora_b.requires_grad:
            db = (dy.T @ low).mul_(projection.scale)
            grads[id(projection.lora_b)] = db.to(projection.lora_b.dtype)
    low_dy = None if not products else products[0] if len(products) == 1 else torch.cat(products, 1)
    if low_dy is not None:
        _adapter_a_gradients(low_dy, x, projections, grads, seed)
    if not need_dx:
        return None
    assert decoded is not None
    return _input_gradient(dzs, low_dy, projections, decoded, seed)


def _magnitude_backward(
    dy: Tensor,
    x: Tensor,
    low: Tensor | None,
    weight: Tensor,
    projection: Projection,
    grads: Gradients,
) -> Tensor:
    """dz of dy; the gradient of the magnitude needs z, which is recomputed."""
    z = x @ weight.T
    if projection.lora_b is not None and low is not None:
        z.addmm_(low, projection.lora_b.to(z.dtype).T, alpha=projection.scale)
    magnitude = projection.magnitude
    assert magnitude is not None
    if magnitude.requires_grad:
        grads[id(magnitude)] = magnitude_gradient(dy, z, weight, projection)
    return dy * row_scale(weight, projection).to(dy.dtype)


def _adapter_a_gradients(
    low_dy: Tensor,
    x: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    seed: Seed | None,
) -> None:
    wanted = [p.lora_a for p in projections if p.lora_a is not None]
    if not any(a.requires_grad for a in wanted):
        return
    da = low_dy.T @ _dropped(x, projections, seed)
    for a, part in zip(wanted, da.split([int(a.shape[0]) for a in wanted]), strict=True):
        if a.requires_grad:
            grads[id(a)] = part.to(a.dtype)


def _input_gradient(
    dys: Sequence[Tensor],
    low_dy: Tensor | None,
    projections: Sequence[Projection],
    decoded: Decoded,
    seed: Seed | None,
) -> Tensor:
    """dx from the outputs' gradients and P = `low_dy` (N, sum r)."""
    masked = seed is not None and max(p.dropout for p in projections) > 0.0
    joined = _stacked(dys, 1)
    if low_dy is not None and not masked and decoded.extended is not None:
        whole = _with_spare(joined, low_dy.shape[1])
        if whole is not None:
            whole[:, -low_dy.shape[1] :] = low_dy
            return whole @ decoded.backward_matrix()
    weights = decoded.weights
    stacked = _stacked(weights, 0)
    if stacked is not None and joined is not None:
        dx = joined @ stacked
    else:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
    if low_dy is not None:
        a = _stacked_a(projections, dx.dtype)
        assert a is not None
        if masked:
            dx += _dropped(low_dy @ a, projections, seed)
        else:
            dx.addmm_(low_dy, a)
    return dx


def _with_spare(joined: Tensor | None, spare: int) -> Tensor | None:
    """`joined` (N, M) widened to the (N, M + spare) that `output_columns` allocated, if it did."""
    if joined is None or joined.stride() != (joined.shape[1] + spare, 1) or joined.shape[0] < 2:
        return None
    shape = (joined.shape[0], joined.shape[1] + spare)
    return joined.as_strided(shape, joined.stride(), joined.storage_offset())


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], seed: Seed | None, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ys, xa = project(x, projections, seed)
        ctx.save_for_backward(x, xa)
        ctx.projections, ctx.seed, ctx.params = projections, seed, params
        return tuple(y.contiguous() for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa = ctx.saved_tensors
        grads: Gradients = {}
        dx = project_backward(
            dys, x, ctx.projections, grads, seed=ctx.seed, xa=xa, need_dx=ctx.needs_input_grad[0]
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
