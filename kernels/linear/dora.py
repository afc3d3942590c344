"""DoRA: LoRA learns the direction of a weight, magnitudes its row lengths.

    y = c * (x W^T + s (x A^T) B^T),     c_i = m_i / n_i,     n_i = || W_i + s B_i A ||

n is treated as a constant in the backward pass, as in the paper (section 4.3) and in PEFT:

    dm_i = sum over rows of dy_i z_i / n_i,     dz = c * dy

The norm is computed from products with A alone, so that B A never exists:

    n_i^2 = ||W_i||^2 + 2 s B_i . (W A^T)_i + s^2 B_i (A A^T) B_i^T

A step computes the norms once: forward leaves what backward reads of them (`RowScale`).
With dropout PEFT drops inputs of W x as well, in the part (c - 1) W x; here W x sees all of x.
Source: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.linear.projection import Projection


@dataclass(frozen=True)
class RowScale:
    """c (out,) in the dtype of the outputs, and n (out,), fp32 or wider.

    n is infinite for a row of zeros, which has no direction: c is 0, and a pruned row stays pruned.
    """

    scale: Tensor
    norms: Tensor


def adapted_row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|| W_i + s B_i A || for weight (out, in), a (r, in), b (out, r): (out,), fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    cross = (weight @ a.to(weight.dtype).T).to(wide)
    with_b = torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale * scale).mul_(b)
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    square: Tensor = norms.square_().add_(with_b.sum(1)).clamp_(min=0)
    return square.sqrt_()


def scale_rows_(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give row i of an adapted weight (out, in) the length of magnitude (out,), in place."""
    norms = _divisors(torch.linalg.vector_norm(weight, dim=1))
    return weight.mul_((magnitude.to(norms.dtype) / norms)[:, None])


def _divisors(norms: Tensor) -> Tensor:
    return norms.masked_fill(norms == 0, math.inf)


def row_scale(weight: Tensor, projection: Projection) -> RowScale | None:
    """That of a projection whose decoded weight is `weight` (out, in); None without a magnitude.

    Raises ValueError for a magnitude without a LoRA pair.
    """
    if projection.magnitude is None:
        return None
    if projection.lora_a is None or projection.lora_b is None:
        raise ValueError("a magnitude needs a LoRA pair: DoRA scales an adapted weight")
    with torch.no_grad():
        a, b = projection.lora_a, projection.lora_b
        norms = _divisors(adapted_row_norms(weight, a, b, projection.scale))
        return RowScale((projection.magnitude / norms).to(weight.dtype), norms)


def magnitude_gradient(dy: Tensor, z: Tensor, scale: RowScale) -> Tensor:
    """dm (out,), fp32 or wider, for dy and z (N, out), z the output before it is scaled."""
    return (dy * z).sum(0, dtype=scale.norms.dtype).div_(scale.norms)
