"""Gradients of linear projections that share an input.

`kernels.linear.lora` has the forward pass.

    P_i = s_i dz_i B_i,   dz_i = c_i * dy_i
    dx  = sum_i dz_i W_i + dropout(sum_i P_i A_i)
    dA_i = P_i^T x~,   dB_i = s_i dz_i^T (x~ A_i^T),   dW_i = dz_i^T x,   db_i = sum dy_i

On a GPU P = dz b, P^T x~ and dz^T (x~ a^T) are one product each for all projections of a group, and
[dz | P] times the left columns of E is dx. P lies in the spare columns of dz. Only a matrix that
was made with spare columns (`Columns`) is written to: a gradient that comes from autograd may be
columns of a wider matrix, and what lies beside it is somebody else's. Such a gradient is copied
where it is narrower than dx, and where it is not, P a is added to dx by a product of its own.

The gradient of the input needs neither x nor x~ A^T, so the two halves can be asked for one after
the other, with x made in between (`input_gradient`, `parameter_gradients`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed, dropout
from kernels.linear.adapters import Adapters, AdapterSaved, Gradients, unpack
from kernels.linear.columns import Columns, copied, matrix_of, output_columns, stacked
from kernels.linear.decode import Decoded, decode, join
from kernels.linear.dora import RowScale, magnitude_gradient
from kernels.linear.projection import Projection, layout_of


def adapter_input(
    x: Tensor, projections: Sequence[Projection], seed: Seed | None, adapters: Adapters | None
) -> Tensor | None:
    """x~ A^T for all adapters on x (N, in), or None without adapters.

    (N, spare) where they are joined, else (N, sum of ranks).
    """
    if adapters is not None:
        return dropped(x, projections, seed) @ adapters.a.T
    joint = _stacked_a(projections, x.dtype)
    return None if joint is None else dropped(x, projections, seed) @ joint.T


def _stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    parts = [p.lora_a.to(dtype) for p in projections if p.lora_a is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dropped(x: Tensor, projections: Sequence[Projection], seed: Seed | None) -> Tensor:
    """x~, which is x without dropout."""
    if seed is None:
        return x
    return dropout(x, max([projection.dropout for projection in projections]), seed)


def split_ranks(joined: Tensor | None, projections: Sequence[Projection]) -> list[Tensor | None]:
    """Column blocks of (N, sum of ranks), one per projection, None where it has no adapter."""
    if joined is None:
        return [None] * len(projections)
    ranks = [projection.rank for projection in projections]
    parts = joined.split(ranks, 1)
    return [part if rank else None for part, rank in zip(parts, ranks, strict=True)]


@dataclass(frozen=True)
class OutputGradients:
    """The outputs' gradients of a group on their way back.

    dys as they came, dzs those of z, and P (N, spare), or on a CPU (N, sum of ranks). `saved` is
    what the forward pass left; without it x~ A^T is recomputed.
    """

    dys: Sequence[Tensor]
    dzs: Columns | Sequence[Tensor]
    low: Tensor | None
    saved: AdapterSaved | None
    scales: Sequence[RowScale | None]
    decoded: Decoded | None
    adapters: Adapters | None

    def joined(self) -> Tensor | None:
        """All dz_i as one matrix, if they are one."""
        return _joined(self.dzs)


def _joined(dzs: Columns | Sequence[Tensor]) -> Tensor | None:
    return dzs.matrix if isinstance(dzs, Columns) else stacked(dzs, 1)


def project_backward(
    dys: Columns | Sequence[Tensor],
    x: Tensor | Columns,
    projections: Sequence[Projection],
    grads: Gradients,
    *,
    seed: Seed | None = None,
    saved: AdapterSaved | None = None,
    decoded: Decoded | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """Adds every wanted parameter gradient to `grads` and returns dx (N, in).

    `saved` is the second value of `project`, recomputed when None. With `need_dx=False` the
    products with W are skipped: nothing below needs a gradient. The spare columns of `dys`, if they
    are `Columns`, are written to, and nothing else that is given.
    """
    dx, outputs = input_gradient(
        dys, projections, seed=seed, saved=saved, decoded=decoded, need_dx=need_dx
    )
    parameter_gradients(outputs, matrix_of(x), projections, grads, seed=seed)
    return dx


def input_gradient(
    dys: Columns | Sequence[Tensor],
    projections: Sequence[Projection],
    *,
    seed: Seed | None = None,
    saved: AdapterSaved | None = None,
    decoded: Decoded | None = None,
    need_dx: bool = True,
) -> tuple[Tensor | None, OutputGradients]:
    """dx (N, in), or None without `need_dx`, and what `parameter_gradients` takes."""
    like = dys[0]
    dora = any(p.magnitude is not None for p in projections)
    if decoded is None and (need_dx or dora):
        decoded = decode(projections, like.dtype)
    if decoded is None:
        adapters = join(projections, like.dtype, like.device, "wide")
    else:
        adapters = decoded.adapters
    masked = seed is not None and max(p.dropout for p in projections) > 0.0
    dzs: Columns | Sequence[Tensor] = dys
    scales: Sequence[RowScale | None] = (None,) * len(projections)
    if dora:
        assert decoded is not None
        scales = decoded.row_scales(projections) if saved is None else saved.scales
        dzs = _scaled(dys, projections, scales)
    if adapters is None:
        low = _low_gradients(list(dzs), projections)
    else:
        if not isinstance(dzs, Columns) and stacked(dzs, 1) is None:
            dzs = copied(dzs, projections)
        low = _low_gradient(dzs, adapters)
    outputs = OutputGradients(list(dys), dzs, low, saved, scales, decoded, adapters)
    if not need_dx:
        return None, outputs
    return _input_gradient(outputs, projections, seed if masked else None), outputs


def _scaled(
    dys: Columns | Sequence[Tensor],
    projections: Sequence[Projection],
    scales: Sequence[RowScale | None],
) -> Columns:
    """dz = c * dy, in memory of its own: dy may be read again."""
    dzs = output_columns(dys[0].shape[0], projections, dys[0])
    for dz, dy, scale in zip(dzs.parts, dys, scales, strict=True):
        if scale is None:
            dz.copy_(dy)
        else:
            torch.mul(dy, scale.scale, out=dz)
    return dzs


def _low_gradient(dzs: Columns | Sequence[Tensor], adapters: Adapters) -> Tensor:
    """P (N, spare), in the spare columns of dzs if they have some."""
    spare = adapters.layout.spare
    if isinstance(dzs, Columns) and dzs.lends(spare):
        return torch.mm(dzs.matrix, adapters.b, out=dzs.spare(spare))
    joined = _joined(dzs)
    assert joined is not None
    return joined @ adapters.b


def _extended(
    dzs: Columns | Sequence[Tensor], low: Tensor, projections: Sequence[Projection]
) -> Tensor | None:
    """[dz | P] (N, sum out + spare); None where adding P a to dx moves fewer bytes than a copy.

    A copy is freed as soon as dx is there: P lies elsewhere too.
    """
    spare = low.shape[1]
    if isinstance(dzs, Columns):
        return dzs.extended(spare) if dzs.lends(spare) else None
    if layout_of(projections).rows >= int(projections[0].weight.shape[1]):
        return None
    own = copied(dzs, projections)
    own.spare(spare).copy_(low)
    return own.extended(spare)


def _low_gradients(dzs: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor | None:
    """P (N, sum of ranks), each adapter's by itself."""
    products = [
        (dz @ projection.lora_b.to(dz.dtype)).mul_(projection.scale)
        for dz, projection in zip(dzs, projections, strict=True)
        if projection.lora_b is not None
    ]
    if not products:
        return None
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _input_gradient(
    outputs: OutputGradients, projections: Sequence[Projection], seed: Seed | None
) -> Tensor:
    """dx of dz and P; with a `seed` P a goes through dropout."""
    decoded, low, dzs = outputs.decoded, outputs.low, outputs.dzs
    assert decoded is not None
    if low is not None and seed is None and decoded.extended is not None:
        own = _extended(dzs, low, projections)
        if own is not None:
            return own @ decoded.backward_matrix()
    weights, joined = decoded.weights, outputs.joined()
    below = stacked(weights, 0)
    pairs = list(zip(dzs, weights, strict=True))
    if below is not None and joined is not None:
        pairs = [(joined, below)]
    if low is None:
        dz, weight = pairs.pop(0)
        dx = dz @ weight
    else:  # first, because it is small: see `kernels.linear.lora._multiply`
        joint = outputs.adapters
        a = _stacked_a(projections, low.dtype) if joint is None else joint.a
        assert a is not None
        dx = dropped(low @ a, projections, seed)
    for dz, weight in pairs:
        dx.addmm_(dz, weight)
    return dx


def parameter_gradients(
    outputs: OutputGradients,
    x: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    *,
    seed: Seed | None = None,
) -> None:
    """Adds every wanted parameter gradient to `grads`, for the group's input x (N, in).

    The decoded weights, if there are any, must still be those of `input_gradient`.
    """
    adapters = outputs.adapters
    xa = None if outputs.saved is None else outputs.saved.low
    if xa is None:
        xa = adapter_input(x, projections, seed, adapters)
    lows = _lows(xa, projections, adapters)
    given = zip(outputs.dys, outputs.dzs, projections, lows, strict=True)
    for index, (dy, dz, projection, low) in enumerate(given):
        if projection.bias is not None and projection.bias.requires_grad:
            grads[id(projection.bias)] = dy.sum(0).to(projection.bias.dtype)
        if projection.magnitude is not None and projection.magnitude.requires_grad:
            assert outputs.decoded is not None
            weight, scale = outputs.decoded.weights[index], outputs.scales[index]
            assert scale is not None
            dm = magnitude_gradient(dy, _unscaled(x, low, weight, projection), scale)
            grads[id(projection.magnitude)] = dm.to(projection.magnitude.dtype)
        if isinstance(projection.weight, Tensor) and projection.weight.requires_grad:
            grads[id(projection.weight)] = (dz.T @ x).to(projection.weight.dtype)
    if outputs.low is None or xa is None:
        return
    if adapters is None:
        _pair_gradients(outputs, x, lows, projections, grads, seed)
    else:
        _joint_gradients(outputs, x, xa, projections, grads, seed)


def _lows(
    xa: Tensor | None, projections: Sequence[Projection], adapters: Adapters | None
) -> list[Tensor | None]:
    """x~ A_i^T (N, r) of each projection, None where it has no adapter."""
    if adapters is None or xa is None:
        return split_ranks(xa, projections)
    lows: list[Tensor | None] = [None] * len(projections)
    for index, _, columns in adapters.layout.blocks():
        lows[index] = xa[:, columns]
    return lows


def _unscaled(x: Tensor, low: Tensor | None, weight: Tensor, projection: Projection) -> Tensor:
    """z, which the gradient of a magnitude needs, recomputed."""
    z = x @ weight.T
    if projection.lora_b is not None and low is not None:
        z.addmm_(low, projection.lora_b.to(z.dtype).T, alpha=projection.scale)
    return z


def _joint_gradients(
    outputs: OutputGradients,
    x: Tensor,
    xa: Tensor,
    projections: Sequence[Projection],
    grads: Gradients,
    seed: Seed | None,
) -> None:
    """Gradients of the pairs, each kind by one product for the group."""
    joined, low, adapters = outputs.joined(), outputs.low, outputs.adapters
    assert joined is not None and low is not None and adapters is not None
    want_a = any(p.lora_a is not None and p.lora_a.requires_grad for p in projections)
    want_b = any(p.lora_b is not None and p.lora_b.requires_grad for p in projections)
    db = joined.T @ xa if want_b else None
    da = low.T @ dropped(x, projections, seed) if want_a else None
    unpack(da, db, projections, adapters.layout, grads)


def _pair_gradients(
    outputs: OutputGradients,
    x: Tensor,
    lows: Sequence[Tensor | None],
    projections: Sequence[Projection],
    grads: Gradients,
    seed: Seed | None,
) -> None:
    """Gradients of the pairs, those of B each by itself."""
    assert outputs.low is not None
    for dz, projection, low in zip(outputs.dzs, projections, lows, strict=True):
        if low is not None and projection.lora_b is not None and projection.lora_b.requires_grad:
            db = (dz.T @ low).mul_(projection.scale)
            grads[id(projection.lora_b)] = db.to(projection.lora_b.dtype)
    wanted = [p.lora_a for p in projections if p.lora_a is not None]
    if not any(a.requires_grad for a in wanted):
        return
    da = outputs.low.T @ dropped(x, projections, seed)
    for a, part in zip(wanted, da.split([int(a.shape[0]) for a in wanted]), strict=True):
        if a.requires_grad:
            grads[id(a)] = part.to(a.dtype)
