"""Reference attention: one document at a time, with torch's public function.

It is slow and runs anywhere. This is the last resort of `kernels.attention.table` and the truth
that it compares with. Each block of `AttentionPlan.blocks` is one call; the backward pass repeats
that call under autograd, so the forward pass saves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.documents import (
    AttentionGradients,
    AttentionSettings,
    add_to_keys,
    heads_first,
)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def documents_forward(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings
) -> tuple[Tensor, list[Tensor]]:
    """o (N, Hq, D), and nothing to save."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups = q.shape[1] // k.shape[1]
    for b in settings.blocks(q):
        part = _attend(
            heads_first(q, b.q0, b.q1, 1),
            heads_first(k, b.k0, b.q1, groups),
            heads_first(v, b.k0, b.q1, groups),
            b.mask,
            settings.scale,
        )
        out[b.q0 : b.q1] = part.squeeze(0).transpose(0, 1)
    return out, []


def documents_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
) -> AttentionGradients:
    """dq, dk, dv; keys of overlapping blocks are summed in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    groups = q.shape[1] // k.shape[1]
    for b in settings.blocks(q):
        leaves = [
            heads_first(q, b.q0, b.q1, 1).detach().requires_grad_(True),
            heads_first(k, b.k0, b.q1, groups).detach().requires_grad_(True),
            heads_first(v, b.k0, b.q1, groups).detach().requires_grad_(True),
        ]
        with torch.enable_grad():
            part = _attend(leaves[0], leaves[1], leaves[2], b.mask, settings.scale)
        grads = torch.autograd.grad(part, leaves, heads_first(do, b.q0, b.q1, 1))
        dq[b.q0 : b.q1] = grads[0].squeeze(0).transpose(0, 1)
        add_to_keys(dk, grads[1], b)
        add_to_keys(dv, grads[2], b)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
