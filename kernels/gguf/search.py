"""Find the scales of small blocks that reproduce their weights best.

A block of n weights x with importance w becomes integers q and one or two numbers:

    symmetric    x ~ s q,        low <= q <= high
    asymmetric   x ~ s q + m,    0 <= q <= high,  m <= 0

For given q the s (and m) of least sum_i w_i (x_i - s q_i - m)^2 have a closed form. So a few scales
around the one that spans the block are tried; each gives integers, these give the best s and m, and
the try of the least error is taken. llama.cpp's quantisers search in the same way (MIT).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-15
_SYMMETRIC_TRIES, _ASYMMETRIC_TRIES, _STEP_TRIES = 19, 21, 9


def symmetric(x: Tensor, weight: Tensor, low: int, high: int) -> Tensor:
    """Scale s (..., 1) of blocks x (..., n), both in fp32.

    The element of the largest magnitude, whose sign s takes the other way round, is tried at
    `low`, the end that has one value more.
    """
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    spread = torch.where(peak.abs() < _TINY, torch.ones_like(peak), peak)
    best_gain = torch.full_like(peak, -1.0)
    scale = torch.zeros_like(peak)
    for number in range(_SYMMETRIC_TRIES):
        reach = low - 0.1 * (number - _SYMMETRIC_TRIES // 2)
        q = (x * (reach / spread)).round_().clamp_(low, high)
        wq = weight * q
        dot, norm = (wq * x).sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        # The error is sum w x^2 - dot^2 / norm: the larger the last, the better.
        gain = dot * dot / norm.clamp_min(_TINY)
        better = (norm > 0) & (gain > best_gain)
        scale = torch.where(better, dot / norm.clamp_min(_TINY), scale)
        best_gain = torch.where(better, gain, best_gain)
    return torch.where(peak.abs() < _TINY, torch.zeros_like(scale), scale)


def asymmetric(x: Tensor, weight: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m (..., 1), m <= 0 <= s, of blocks x (..., n); all in fp32."""
    least = x.amin(-1, keepdim=True).clamp_max(0)
    span = (x.amax(-1, keepdim=True) - least).clamp_min(_TINY)
    total_w = weight.sum(-1, keepdim=True)
    total_x = (weight * x).sum(-1, keepdim=True)
    best = torch.full_like(least, torch.inf)
    scale, minimum = span / high, least
    for number in range(_ASYMMETRIC_TRIES):
        reach = high - 1.0 + 0.1 * number
        q = ((x - least) * (reach / span)).round_().clamp_(0, high)
        wq = weight * q
        total_q, dot = wq.sum(-1, keepdim=True), (wq * x).sum(-1, keepdim=True)
        norm = (wq * q).sum(-1, keepdim=True)
        determinant = total_w * norm - total_q * total_q
        solvable = determinant > 0
        safe = torch.where(solvable, determinant, torch.ones_like(determinant))
        s = (total_w * dot - total_x * total_q) / safe
        m = (norm * total_x - total_q * dot) / safe
        # A minimum above zero cannot be stored: the best line through zero then.
        s = torch.where(m > 0, dot / norm.clamp_min(_TINY), s)
        m = m.clamp_max(0)
        error = (weight * (x - s * q - m).square_()).sum(-1, keepdim=True)
        better = solvable & (error < best) & (s > 0)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
        best = torch.where(better, error, best)
    return scale, minimum


def common_step(values: Tensor, weight: Tensor, high: int) -> Tensor:
    """The step s (B, 1, 1) by which values (B, n, 1) >= 0 are s q with 0 <= q <= high best."""
    peak = values.amax(1, keepdim=True)
    best, step = torch.full_like(peak, torch.inf), peak / high
    for number in range(_STEP_TRIES):
        tried = peak / (high + 0.1 * (number - _STEP_TRIES // 2))
        q = integers(values, tried, 0, high)
        dot, norm = (
            (weight * q * values).sum(1, keepdim=True),
            (weight * q * q).sum(1, keepdim=True),
        )
        tried = torch.where(norm > 0, dot / norm.clamp_min(1e-30), tried)
        error = (weight * (values - tried * q).square_()).sum(1, keepdim=True)
        better = error < best
        step, best = torch.where(better, tried, step), torch.where(better, error, best)
    return step


def integers(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Integers of x at a given scale, in fp32; zero where the scale is zero."""
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (x * inverse).round_().clamp_(low, high)
