"""Attention of new tokens over a key/value cache, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.documents import heads_first, window_mask


def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float
) -> Tensor:
    """Attention of the newest tokens of one sequence over everything cached, without gradients.

    q (T, Hq, D) are the last T of the S positions of keys, values (S, Hkv, D); returns
    (T, Hq, D).
    """
    queries, lead = q.shape[0], keys.shape[0] - q.shape[0]
    if window is not None and lead >= window:
        first = lead - window + 1
        keys, values, lead = keys[first:], values[first:], lead - first
    groups, total = q.shape[1] // keys.shape[1], lead + queries
    if queries == 1:
        # The heads of a group stand in as queries of their one key/value head: no cache is copied.
        newest = q.view(1, keys.shape[1], groups, q.shape[2])
        keys, values = heads_first(keys, 0, total, 1), heads_first(values, 0, total, 1)
        out = torch.nn.functional.scaled_dot_product_attention(newest, keys, values, scale=scale)
        return out.reshape(q.shape)
    out = torch.nn.functional.scaled_dot_product_attention(
        heads_first(q, 0, queries, 1),
        heads_first(keys, 0, total, groups),
        heads_first(values, 0, total, groups),
        attn_mask=window_mask(queries, lead, window or total, q),
        scale=scale,
    )
    return out.squeeze(0).transpose(0, 1).contiguous()


def batched_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of one token of each of B sequences over its cached keys, without gradients.

    q (B, Hq, D); keys, values (B, Hkv, S, D) with the token's own; mask (B, 1, 1, S), if any, is
    added to the scores. Returns (B, Hq, D).
    """
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    # The heads of a group stand in as queries of their one key/value head: no cache is copied.
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    if mask is not None:
        mask = mask.expand(-1, -1, grouped.shape[2], -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(batch, heads, dim)
