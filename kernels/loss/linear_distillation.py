"""Output head and distillation in one op that never holds all logits.

For hidden states h (n, H) of a student with head W (V, H) and t (n, H') of a teacher with head W':

    z = h W^T,  p = softmax(z),     z' = t W'^T,  p' = softmax(z')
    loss = sum_i KL(p'_i || p_i) / num_items,     dz = (p - p') / num_items,  dh = dz W

The gradient is formed in the forward pass, one chunk of tokens at a time, as in
`kernels.loss.linear_cross_entropy`. The teacher's side has none, nor has a head: both are frozen.
Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.loss.linear_cross_entropy import (
    Head,
    chunk_tokens,
    head_gradient,
    head_logits,
)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Head,
        teacher_hidden: Tensor,
        teacher_weight: Head,
        num_items: float,
        rows: int,
        weights: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            log_p = head_logits(hidden[part], weight).to(wide).log_softmax(1)
            log_q = head_logits(teacher_hidden[part], teacher_weight).to(wide).log_softmax(1)
            q = log_q.exp()
            losses[part] = log_q.sub_(log_p).mul_(q).sum(1)
            dlogits = log_p.exp_().sub_(q)
            if weights is not None:
                each = weights[part].to(wide)
                losses[part] *= each
                dlogits.mul_(each.unsqueeze(1))
            head_gradient(dlogits.to(hidden.dtype), weight, 1.0, dhidden[part])
        # The factor comes last: in fp16 a difference of probabilities could vanish under it.
        ctx.save_for_backward(dhidden)
        ctx.num_items = num_items
        return losses.sum() / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        factor = (dloss / ctx.num_items).to(dhidden.dtype)
        return dhidden * factor, None, None, None, None, None, None


def linear_distillation(
    hidden: Tensor,
    weight: Head,
    teacher_hidden: Tensor,
    teacher_weight: Head,
    num_items: float | None = None,
    tokens_per_chunk: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL divergence of the student's next-token distribution from the teacher's, a scalar.

    hidden (n, H) and teacher_hidden (n, H') are those of the trained tokens, weight (V, H) and
    teacher_weight (V, H') the frozen heads. The sum over tokens is divided by `num_items`, by
    default n. Memory holds two chunks of logits, each of `tokens_per_chunk` tokens, by default as
    many as in `linear_cross_entropy`. `weights` (n,) multiply the tokens' divergences. Returns fp32
    or wider. Raises `ValueError` where the vocabularies or the numbers of tokens differ, or the
    head wants a gradient.
    """
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student's head has {weight.shape[0]} rows, the teacher's "
            f"{teacher_weight.shape[0]}; distillation needs the same vocabulary"
        )
    if hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{hidden.shape[0]} tokens of the student and {teacher_hidden.shape[0]} of the teacher"
        )
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("the output head wants a gradient; distillation trains a frozen head")
    loss: Tensor = _LinearDistillation.apply(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        float(max(1, hidden.shape[0]) if num_items is None else num_items),
        tokens_per_chunk or chunk_tokens(weight.shape[0], hidden.itemsize, gpu=hidden.is_cuda),
        weights,
    )
    return loss
