"""GGUF's blocks of 256 weights: Q4_K, Q5_K and Q6_K.

    Q4_K   fp16 d, fp16 e, 12 bytes, 128 bytes             x = d a q - e b, eight groups of 32
    Q5_K   fp16 d, fp16 e, 12 bytes, 32 bytes, 128 bytes   the same with five bits
    Q6_K   128 bytes, 64 bytes, 16 x int8 a, fp16 d        x = d a (q - 32), sixteen groups of 16

a and b of the first two are six-bit numbers, packed into the 12 bytes. Source: ggml's quantisation
formats (MIT).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gguf.search import asymmetric, common_step, integers, symmetric
from kernels.gguf.simple_blocks import as_stored, half_bytes

_REFITS = 2
Numbers = tuple[Tensor, Tensor, Tensor]


def q4_k(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 256) as bytes (B, 144)."""
    header, q = _with_minima(x, weight, 15)
    return torch.cat((header, _paired_nibbles(q)), -1)


def q5_k(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 256) as bytes (B, 176)."""
    header, q = _with_minima(x, weight, 31)
    # Bit g of byte j is the fifth bit of weight j of group g.
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device).view(8, 1)
    high = ((q >> 4) << shifts).sum(-2, dtype=torch.uint8)
    return torch.cat((header, high, _paired_nibbles(q & 15)), -1)


def q6_k(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 256) as bytes (B, 210)."""
    groups, weights = x.view(-1, 16, 16), weight.view(-1, 16, 16)
    scales = symmetric(groups, weights, -32, 31)
    peak = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = as_stored(peak / -128)  # (B, 1, 1)
    a = integers(scales, d, -128, 127)
    q = (integers(groups, d * a, -32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    top = q >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    return torch.cat(
        (
            low.flatten(1),
            high.flatten(1),
            a.flatten(1).to(torch.int8).view(torch.uint8),
            half_bytes(d.flatten(1)),
        ),
        -1,
    )


def _with_minima(x: Tensor, weight: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """The sixteen bytes of scales, and the integers (B, 8, 32) as bytes."""
    groups, weights = x.view(-1, 8, 32), weight.view(-1, 8, 32)
    scales, minima = asymmetric(groups, weights, high)
    counts = weights.sum(-1, keepdim=True)
    d = as_stored(common_step(scales, counts, 63))  # (B, 1, 1)
    e = as_stored(common_step(-minima, counts, 63))
    a = integers(scales, d, 0, 63)
    b = integers(-minima, e, 0, 63)
    q = integers(groups + e * b, d * a, 0, high)
    for _ in range(_REFITS):
        a, b, q = _better_groups(groups, weights, (d, e), (a, b, q), high)
        d, e, q = _better_steps(groups, weights, (d, e), (a, b, q), high)
    six_bit = _packed(a.squeeze(-1).to(torch.uint8), b.squeeze(-1).to(torch.uint8))
    header = torch.cat((half_bytes(d.flatten(1)), half_bytes(e.flatten(1)), six_bit), -1)
    return header, q.to(torch.uint8)


def _better_groups(
    x: Tensor, weight: Tensor, steps: tuple[Tensor, Tensor], numbers: Numbers, high: int
) -> Numbers:
    """a, b and q of each group (B, 8, 32), by the best line through q where that errs less."""
    (d, e), (a, b, q) = steps, numbers
    s, m = _line(x, weight, q, torch.ones_like(b), (2,))
    new_a, new_b = integers(s, d, 0, 63), integers(m, e, 0, 63)
    new_q = integers(x + e * new_b, d * new_a, 0, high)
    before = (weight * (x - d * a * q + e * b).square_()).sum(2, keepdim=True)
    after = (weight * (x - d * new_a * new_q + e * new_b).square_()).sum(2, keepdim=True)
    better = after < before
    return (
        torch.where(better, new_a, a), torch.where(better, new_b, b), torch.where(better, new_q, q)
    )  # fmt: skip


def _better_steps(
    x: Tensor, weight: Tensor, steps: tuple[Tensor, Tensor], numbers: Numbers, high: int
) -> Numbers:
    """d, e and q of each block (B, 8, 32), by the best d and e where those err less."""
    (d, e), (a, b, q) = steps, numbers
    new_d, new_e = map(as_stored, _line(x, weight, a * q, b, (1, 2)))
    new_q = integers(x + new_e * b, new_d * a, 0, high)
    before = (weight * (x - d * a * q + e * b).square_()).sum((1, 2), keepdim=True)
    after = (weight * (x - new_d * a * new_q + new_e * b).square_()).sum((1, 2), keepdim=True)
    better = after < before
    return (
        torch.where(better, new_d, d), torch.where(better, new_e, e), torch.where(better, new_q, q)
    )  # fmt: skip


def _line(
    x: Tensor, weight: Tensor, u: Tensor, v: Tensor, over: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """s, m >= 0 of the least weighted error of x ~ s u - m v, summed over the dimensions `over`."""

    def total(values: Tensor) -> Tensor:
        return (weight * values).sum(over, keepdim=True)

    uu, uv, vv, xu, xv = total(u * u), total(u * v), total(v * v), total(x * u), total(x * v)
    determinant = uu * vv - uv * uv
    solvable = determinant > 1e-6 * uu * vv
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    m = torch.where(solvable, (xu * uv - xv * uu) / safe, torch.zeros_like(uu)).clamp_min_(0)
    # Without a minimum, or with one below zero, the best line goes through zero.
    s = torch.where(m > 0, (xu * vv - xv * uv) / safe, xu / uu.clamp_min(1e-30))
    return s.clamp_min_(0), m


def _packed(a: Tensor, b: Tensor) -> Tensor:
    """Sixteen six-bit numbers a, b (B, 8) as bytes (B, 12).

    The first four of each stand whole in bytes 0-3 and 4-7. Of the last four the low halves are in
    bytes 8-11, and the two high bits above those of the first four.
    """
    first_a = a[:, :4] | (a[:, 4:] >> 4) << 6
    first_b = b[:, :4] | (b[:, 4:] >> 4) << 6
    return torch.cat((first_a, first_b, a[:, 4:] & 15 | (b[:, 4:] & 15) << 4), -1)


def _paired_nibbles(q: Tensor) -> Tensor:
    """Numbers (B, 8, 32) as bytes (B, 128): each odd group above the even one before it."""
    return (q[:, 0::2] | q[:, 1::2] << 4).flatten(1)
