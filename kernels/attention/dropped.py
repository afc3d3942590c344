"""Causal attention whose weights are dropped at random.

    P = softmax(scale q k^T + mask),   D = dropout(P),   o = D v
    dv = D^T do,   dP = dropout(do v^T),   dS = P * (dP - rowsum(do * o)),
    dq = scale dS k,   dk = scale dS^T q

with one mask per layer, forward and backward (`kernels.elementwise.dropout`; its rows are query
heads of tokens, its columns the keys of the row's block). rowsum(do * o) is rowsum(dP * P), for
o = D v. torch's fused attention takes no mask of ours, so the weights of one block at a time, (1,
Hq, T, T), exist in fp32; nothing of that size is saved. For rows of some hundred tokens that is
little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.documents import (
    AttentionGradients,
    AttentionSettings,
    Block,
    add_to_keys,
    heads_first,
)
from kernels.elementwise.dropout import Seed, dropout


def _weights(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """P (1, Hq, T, K) of one block in fp32 or wider; q and k have their heads first."""
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    if block.mask is not None:
        scores += block.mask
    else:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1)


def _drop(weights: Tensor, block: Block, settings: AttentionSettings) -> Tensor:
    """Weights, or their gradient, (1, Hq, T, K), with elements dropped."""
    assert isinstance(settings.seed, Seed)
    _, heads, queries, _ = weights.shape
    heads = settings.all_heads or heads
    first = block.q0 * heads + settings.first_head * queries
    return dropout(weights, settings.dropout, settings.seed.at(0, first_row=first).scaled(heads))


def dropped_forward(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings
) -> tuple[Tensor, list[Tensor]]:
    """o (N, Hq, D), and nothing to save."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups = q.shape[1] // k.shape[1]
    for b in settings.blocks(q):
        queries, keys = heads_first(q, b.q0, b.q1, 1), heads_first(k, b.k0, b.q1, groups)
        dropped = _drop(_weights(queries, keys, b, settings.scale), b, settings)
        part = dropped.to(q.dtype) @ heads_first(v, b.k0, b.q1, groups)
        out[b.q0 : b.q1] = part.squeeze(0).transpose(0, 1)
    return out, []


def dropped_backward(
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
        queries, grad = heads_first(q, b.q0, b.q1, 1), heads_first(do, b.q0, b.q1, 1)
        keys, values = (heads_first(x, b.k0, b.q1, groups) for x in (k, v))
        weights = _weights(queries, keys, b, settings.scale)
        d_values = _drop(weights, b, settings).to(q.dtype).transpose(2, 3) @ grad
        d_weights = _drop((grad @ values.transpose(2, 3)).to(wide), b, settings)
        products = grad.to(wide) * heads_first(out, b.q0, b.q1, 1).to(wide)
        d_scores = d_weights.sub_(products.sum(3, keepdim=True)).mul_(weights).mul_(settings.scale)
        d_scores = d_scores.to(q.dtype)
        dq[b.q0 : b.q1] = (d_scores @ keys).squeeze(0).transpose(0, 1)
        add_to_keys(dk, d_scores.transpose(2, 3) @ queries, b)
        add_to_keys(dv, d_values, b)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
