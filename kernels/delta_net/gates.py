"""Gates of the gated delta rule, and its l2 norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.delta_net.operands import wide

L2_EPS = 1e-6


def gates_forward(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g = -e^a_log softplus(a + dt_bias) and beta = sigmoid(b), fp32 or wider.

    a, b (N, Hv) are projections of the layer input; a_log, dt_bias (Hv,) are parameters.
    """
    shifted = wide(a) + wide(dt_bias)
    return F.softplus(shifted).mul_(-wide(a_log).exp()), torch.sigmoid(wide(b))


def gates_backward(
    dg: Tensor, dbeta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b (N, Hv) in their dtypes and of a_log, dt_bias (Hv,) in theirs."""
    g, beta = gates_forward(a, b, a_log, dt_bias)
    da = torch.sigmoid(wide(a) + wide(dt_bias)).mul_(dg).mul_(-wide(a_log).exp())
    db = dbeta * beta * (1 - beta)
    da_log = (dg * g).sum(0)
    d_dt_bias = da.sum(0).to(dt_bias.dtype)
    return da.to(a.dtype), db.to(b.dtype), da_log.to(a_log.dtype), d_dt_bias


def l2norm_forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale * x / sqrt(sum x^2 + 1e-6) over the last dimension, fp32 or wider, and rstd."""
    values = wide(x)
    rstd = torch.rsqrt(values.square().sum(-1, keepdim=True).add_(L2_EPS))
    return values * (rstd * scale), rstd


def l2norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient of x, in its dtype, for dy of `l2norm_forward(x, scale)`."""
    unit = wide(x) * rstd
    along = (unit * dy).sum(-1, keepdim=True)
    return (dy - unit * along).mul_(rstd * scale).to(x.dtype)
