"""Gated RMSNorm of a DeltaNet layer's heads, norm first.

    y = (w * rms(o)) * silu(z)
    rstd = 1 / sqrt(mean_j o_j^2 + eps),   n = w * o rstd,   y = n silu(z)
    dz = dy n silu'(z),   dn = dy silu(z),   do and dw as in RMSNorm with dy = dn

The weight is plain (not 1 + w) and shared by all heads. Arithmetic is fp32 between load and store;
o rstd is rounded to the dtype of o before the product with w, as Hugging Face's Qwen3-Next does.
The kernels for a GPU are in `kernels.delta_net.gated_rms_norm_triton`.
Source: Yang et al. 2024 (Gated Delta Networks, arXiv 2412.06464), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.delta_net import gated_rms_norm_triton
from kernels.delta_net.operands import wide
from kernels.runtime.dispatch import use_triton


def gated_rms_norm_forward(
    o: Tensor, z: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """o, z (..., V), weight (V,) -> y (..., V) in the dtype of o, rstd (..., 1) fp32 or wider."""
    if use_triton(o):
        return gated_rms_norm_triton.forward(o, z, weight, eps)
    values = wide(o)
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True).add_(eps))
    normed = (values * rstd).to(o.dtype).mul_(weight.to(o.dtype))
    return F.silu(wide(z)).mul_(normed).to(o.dtype), rstd


def gated_rms_norm_backward(
    dy: Tensor, o: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, *, need_dweight: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """do and dz in the shapes and dtypes of o and z, and, if asked for, dw (V,)."""
    if use_triton(o):
        return gated_rms_norm_triton.backward(dy, o, z, weight, rstd, need_dweight)
    dy_wide, z_wide, scale = wide(dy), wide(z), wide(weight)
    xhat = wide(o) * rstd
    dz = torch.ops.aten.silu_backward(dy_wide * (xhat * scale), z_wide).to(z.dtype)
    d_normed = F.silu(z_wide).mul_(dy_wide)
    dweight = None
    if need_dweight:
        dweight = (d_normed * xhat).flatten(0, -2).sum(0).to(weight.dtype)
    d_xhat = d_normed.mul_(scale)
    mean = (d_xhat * xhat).mean(-1, keepdim=True)
    do = d_xhat.sub_(xhat.mul_(mean)).mul_(rstd)
    return do.to(o.dtype), dz, dweight


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, o: Tensor, z: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        y, rstd = gated_rms_norm_forward(o, z, weight, eps)
        ctx.save_for_backward(o, z, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        o, z, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[2]
        do, dz, dweight = gated_rms_norm_backward(dy, o, z, weight, rstd, need_dweight=need)
        return do, dz, dweight, None


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """(w * rms(o)) * silu(z) with gradients for o, z (..., V) and weight (V,)."""
    y: Tensor = _GatedRMSNorm.apply(o, z, weight, eps)
    return y
