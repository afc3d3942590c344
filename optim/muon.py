"""Muon: orthogonal momentum for hidden matrices, AdamW for the rest.

Maths (Jordan 2024, https://kellerjordan.github.io/posts/muon), with g the scaled gradient of a
matrix (m, n) and mu the momentum:

    v = mu v + (1 - mu) g        u = mu v + (1 - mu) g        o = NS5(u), near U V^T of u = U S V^T
    p = (1 - lr wd) p - lr 0.2 sqrt(max(m, n)) o

NS5 is five times x = a x + (b x x^T + c (x x^T)^2) x of x = u / |u|, in bf16. The factor before o
(Liu et al. 2025, arXiv 2502.16982) gives updates the size of AdamW's, so one learning rate and
weight decay serve all parameters. It is torch.optim.Muon with adjust_lr_fn="match_rms_adamw". Of a
tensor of matrices, as experts have, each is made orthogonal by itself.

Parameters of groups with `muon` false are AdamW's, with fp32 moments (`kernels.adamw8bit` has the
maths): embeddings, the head, norms and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from optim.param_groups import decays
from optim.per_parameter import PerParameter, add_update

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_EPS = 1e-7
_LIKE_ADAMW = 0.2


class Muon(PerParameter):
    """Muon for groups with `muon` true (the default), AdamW for the others."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not 0.0 <= momentum < 1.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"momentum {momentum} and betas {betas} must lie in [0, 1)")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "muon": True,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["muon"] and any(param.ndim < 2 for param in group["params"]):
                raise ValueError("Muon is for matrices: give others in a group with muon false")

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The momentum in the parameter's type, or AdamW's moments in fp32."""
        if group["muon"]:
            return {"momentum": torch.zeros_like(param, requires_grad=False)}
        return {
            name: torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq")
        }

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        """One step of a parameter."""
        lr = float(group["lr"])
        decay = 1.0 - lr * group["weight_decay"]
        if not group["muon"]:
            update = _adamw(grad, state, group, step)
            add_update(param, update, decay, -lr)
            return
        mu, momentum = group["momentum"], state["momentum"]
        momentum.copy_(momentum.to(torch.float32).lerp_(grad, 1.0 - mu))
        update = orthogonal(grad.lerp_(momentum.to(torch.float32), mu))
        factor = _LIKE_ADAMW * math.sqrt(max(param.shape[-2:]))
        add_update(param, update.to(torch.float32), decay, -lr * factor)


def orthogonal(matrix: Tensor) -> Tensor:
    """matrix (m, n), or (E, m, n), with all its singular values near 1, in bf16."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _adamw(
    grad: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], step: int
) -> Tensor:
    """AdamW's direction: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""
    beta1, beta2 = group["betas"]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(grad, 1.0 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = v.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    direction: Tensor = torch.div(m, root, out=root).div_(1.0 - beta1**step)
    return direction


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for a parameter: a matrix between embedding and head that decays."""
    owner = name.rsplit(".", 2)[-2] if "." in name else ""
    return decays(name, parameter) and owner not in ("embed_tokens", "lm_head")
