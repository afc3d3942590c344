"""AdamW with both moments stored in 8 bits.

Maths (Loshchilov & Hutter 2019; Dettmers et al. 2022), in fp32, with g the scaled gradient:

    m = b1 m + (1 - b1) g                    v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

The step reads the new m and v before they are rounded. They are then stored in blocks of 256 in the
dynamic 8-bit map, signed for m and unsigned for v (`kernels.adamw8bit.dynamic_map`).

Layout. The moments of all parameters lie in flat buffers of rows of 256 elements. Each parameter
begins a new row, so that its block boundaries, and with them its codes, are those it would have
alone. A `Slab` is a run of rows whose parameters share every setting; the parameters themselves
stay where they are and are updated in place.

A parameter in bf16 or fp16 is updated in fp32 and rounded to nearest; or, by choice, rounded
stochastically (bf16, Philox on (seed, step, parameter, index)); or updated through an fp32 master
copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import Rounding, dequantize_blocks, quantize_blocks
from kernels.runtime.random import philox_bits, round_stochastically
from kernels.runtime.scratch import scratch

ROW = 256
"""Elements per quantisation block."""

ZERO_CODE = 127
"""The code of 0 in the signed map. The padding of a parameter's last row always holds it."""


LARGEST_NORM = 2.0**63
"""Longer scaled gradients change nothing: their squares overflow fp32 moments, or soon would."""


@dataclass(frozen=True)
class Piece:
    """Elements `begin:end` of parameter `index`; `begin` is a multiple of `ROW`."""

    index: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return -(-(self.end - self.begin) // ROW)


@dataclass(frozen=True)
class Moments:
    """The moments of a slab: codes uint8 (rows, 256) with absmax fp32 (rows,), or fp32 values."""

    m: Tensor
    v: Tensor
    m_absmax: Tensor | None = None
    v_absmax: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """What one step applies to every element of a slab; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    rounding: Rounding = "grid"
    stochastic_seed: int | None = None

    @property
    def decay(self) -> float:
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        return -self.lr / (1.0 - self.beta1**self.step)

    @property
    def denominator_scale(self) -> float:
        return math.sqrt(1.0 - self.beta2**self.step)


def may_step(grads: Sequence[Tensor], grad_scale: float | Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the scaled gradients have squares in fp32, and `others` no NaN or infinity.

    Waits for the device.
    """
    tensors, count = [*grads, *others], len(grads)
    if not tensors:
        return True
    for dtype in (torch.float32, torch.float64):
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype))
        norms[:count] *= grad_scale
        # NaN is not less.
        if bool((norms.abs() < LARGEST_NORM).all()):
            return True
    # In float64 no norm of finite fp32 values overflows; moments may be as large as they come.
    small = (norms[:count].abs() < LARGEST_NORM).all()
    return bool(small & torch.isfinite(norms[count:]).all())


def adamw_slab_(
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    update: Update,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """One AdamW step on a slab, in place, in plain torch.

    `params` and `grads` are the flat pieces themselves, in the order of `pieces`; `moments` has
    their rows. `grad_scale` multiplies the gradients as they are read.
    """
    rows = sum(piece.rows for piece in pieces)
    shape, device = (rows, ROW), moments.m.device
    g = scratch("adamw gradient", shape, torch.float32, device)
    padded = sum(piece.end - piece.begin for piece in pieces) != rows * ROW
    if padded:
        g.zero_()
    torch._foreach_copy_(_split(g, pieces), list(grads))
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        g.mul_(grad_scale)
    m, v = moments.m, moments.v
    if moments.m_absmax is not None and moments.v_absmax is not None:
        m = scratch("adamw m", shape, torch.float32, device)
        v = scratch("adamw v", shape, torch.float32, device)
        dequantize_blocks(moments.m, moments.m_absmax, signed=True, out=m)
        dequantize_blocks(moments.v, moments.v_absmax, signed=False, out=v)
    m.mul_(update.beta1).add_(g, alpha=1.0 - update.beta1)
    v.mul_(update.beta2).addcmul_(g, g, value=1.0 - update.beta2)
    denominator = torch.sqrt(v, out=g).div_(update.denominator_scale).add_(update.eps)
    _apply(pieces, params, _split(m, pieces), _split(denominator, pieces), update)
    if moments.m_absmax is not None and moments.v_absmax is not None:
        codes, absmax = quantize_blocks(m, signed=True, rounding=update.rounding, scratch=m)
        if update.rounding == "nearest":
            # A negative moment never becomes 0, as in bitsandbytes' CUDA kernel.
            codes.sub_(((codes == ZERO_CODE) & (m < 0)).to(torch.uint8))
        moments.m.copy_(codes)
        moments.m_absmax.copy_(absmax)
        codes, absmax = quantize_blocks(v, signed=False, rounding=update.rounding, scratch=v)
        moments.v.copy_(codes)
        moments.v_absmax.copy_(absmax)
        if padded:
            for part, zero in ((moments.m, ZERO_CODE), (moments.v, 0)):
                for padding in _cut(part, pieces)[1::2]:
                    padding.fill_(zero)


def _cut(slab: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """Flat parts of a slab: of each piece its elements, then the padding of its last row."""
    sizes = []
    for piece in pieces:
        used = piece.end - piece.begin
        sizes += [used, piece.rows * ROW - used]
    parts: Sequence[Tensor] = torch.split(slab.view(-1), sizes)
    return parts


def _split(slab: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """The elements of each piece, without padding."""
    return list(_cut(slab, pieces)[::2])


def _apply(
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    m: Sequence[Tensor],
    denominator: Sequence[Tensor],
    update: Update,
) -> None:
    exact = list(params)
    narrow = [i for i, param in enumerate(params) if param.dtype != torch.float32]
    for i in narrow:
        exact[i] = params[i].float()
    if update.decay != 1.0:
        torch._foreach_mul_(exact, update.decay)
    torch._foreach_addcdiv_(exact, list(m), list(denominator), update.step_size)
    for i in narrow:
        if update.stochastic_seed is None or params[i].dtype != torch.bfloat16:
            params[i].copy_(exact[i])
            continue
        index = torch.arange(pieces[i].begin, pieces[i].end, device=params[i].device)
        bits = philox_bits(update.stochastic_seed, index, 0, pieces[i].index, update.step)
        params[i].copy_(round_stochastically(exact[i], bits))
