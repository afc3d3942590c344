"""DoRA: LoRA learns the direction of a weight, magnitudes its row lengths.

    y = c * (x W^T + s (x A^T) B^T),     c_i = m_i / n_i,     n_i = || W_i + s B_i A ||

n is treated as a constant in the backward pass, as in the paper (section 4.3) and in PEFT:

    dm_i = sum over rows of dy_i z_i / n_i,     dz = c * dy

The norm is computed from products with A alone, so that B A never exists:

    n_i^2 = ||W_i||^2 + 2 s B_i . (W A^T)_i + s^2 B_i (A A^T) B_i^T

With dropout PEFT drops inputs of W x as well, in the part (c - 1) W x; here W x sees all of x.
Source: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.linear.projection import Projection


def adapted_row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|| W_i + s B_i A || for weight (out, in), a (r, in), b (out, r): (out,), fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    cross = (weight @ a.to(weight.dtype).T).to(wide)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    square += 2 * scale * (b * cross).sum(1)
    square += scale * scale * ((b @ (a @ a.T)) * b).sum(1)
    norms: Tensor = square.clamp_(min=0).sqrt_()
    return norms


def scale_rows_(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give row i of an adapted weight (out, in) the length of magnitude (out,), in place."""
    norms = torch.linalg.vector_norm(weight, dim=1)
    return weight.mul_(_over_norms(magnitude, norms)[:, None])


def _norms(weight: Tensor, projection: Projection) -> Tensor:
    if projection.lora_a is None or projection.lora_b is None:
        raise ValueError("a magnitude needs a LoRA pair: DoRA scales an adapted weight")
    with torch.no_grad():
        a, b = projection.lora_a, projection.lora_b
        return adapted_row_norms(weight, a, b, projection.scale)


def _over_norms(values: Tensor, norms: Tensor) -> Tensor:
    """values_i / n_i; 0 for a row of zeros, which has no direction: a pruned row stays pruned."""
    return torch.where(norms > 0, values.to(norms.dtype) / norms, 0.0)


def row_scale(weight: Tensor, projection: Projection) -> Tensor:
    """c (out,) of a projection whose decoded weight is `weight` (out, in)."""
    assert projection.magnitude is not None
    norms = _norms(weight, projection)
    return _over_norms(projection.magnitude.detach(), norms)


def magnitude_gradient(dy: Tensor, z: Tensor, weight: Tensor, projection: Projection) -> Tensor:
    """dm (out,) for dy and z (N, out), z the output before it is scaled."""
    assert projection.magnitude is not None
    norms = _norms(weight, projection)
    return _over_norms((dy * z).to(norms.dtype).sum(0), norms).to(projection.magnitude.dtype)
