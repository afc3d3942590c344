"""Clipping by the global norm of the gradients.

Squares are summed in float64, per tensor and then over the tensors in the order given: a sum of
millions of fp32 squares in fp32 is off by 1e-4, and overflows where no gradient does. The same
gradients in the same order give the same bits. If the norm is not finite the gradients are left as
they are, so that the optimiser, which skips such a step, still sees what happened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels.adamw8bit import LARGEST_NORM
from kernels.runtime.ranks import Ranks, gathered


def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale the gradients of `parameters` in place to a joint 2-norm of at most `max_norm`.

    Returns the norm before clipping, fp32 (), on the gradients' device, without waiting for that
    device. Parameters without a gradient are left out; with none at all the norm is 0. An infinite
    `max_norm` only measures. Raises ValueError for a `max_norm` that is not positive.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    norm = global_norm(grads)
    if math.isfinite(max_norm):
        torch._foreach_mul_(grads, clip_coefficient(norm, max_norm))
    return norm


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all `tensors` together, fp32 ()."""
    norms = torch.stack(torch._foreach_norm(tensors, 2, torch.float64))
    total: Tensor = torch.linalg.vector_norm(norms)
    return total.float()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm), fp32 (), and 1 where `norm` is not finite."""
    scale = (max_norm / norm).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), scale, torch.ones_like(scale))


def usable_norm(norm: Tensor, max_norm: float) -> Tensor:
    """`norm`, and infinity where gradients, clipped to `max_norm`, are longer than a step takes."""
    clipped = norm.clamp(max=max_norm)
    return torch.where(clipped < LARGEST_NORM, norm, torch.full_like(norm, math.inf))


def norm_over_ranks(divided: Sequence[Tensor], whole: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm, fp32 (), of gradients of which ranks have parts and of whole ones, alike on all.

    Squares are summed in float64, in the order of the ranks, so all have the same bits; one rank's
    gradient that is not finite makes the norm so on all.
    """
    device = (*divided, *whole)[0].device
    own = torch.zeros(1, dtype=torch.float64, device=device)
    if divided:
        own += torch.stack(torch._foreach_norm(list(divided), 2, torch.float64)).square().sum()
    total = gathered(ranks, own).sum()
    if whole:
        total = (
            total + torch.stack(torch._foreach_norm(list(whole), 2, torch.float64)).square().sum()
        )
    return total.sqrt().float()
