"""Attention on a CPU: torch's fused function, one call per block.

In 16 bits it packs small tiles for every product. Blocks of few keys, which take up to five times
as long so as in fp32, are converted there and back.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.attention.documents import AttentionGradients, AttentionSettings, Block, heads_first

_FEW_KEYS = {"forward": 128, "backward": 256}


@cache
def flash_reads_groups() -> bool:
    """Whether torch's fused CPU attention takes fewer key/value heads, backward included."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, h, 5, 8, generator=generator) for h in (4, 2, 2, 4))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    try:
        out, lse = forward(q, k, v, 0.0, True)
        got = backward(do, q, k, v, out, lse, 0.0, True)
    except RuntimeError:
        return False
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    out_wide, lse_wide = forward(q, wide_k, wide_v, 0.0, True)
    want = backward(do, q, wide_k, wide_v, out_wide, lse_wide, 0.0, True)
    return (
        torch.allclose(out, out_wide, atol=1e-5)
        and got[1].shape == k.shape
        and torch.allclose(got[1], want[1].view(1, 2, 2, 5, 8).sum(2), atol=1e-5)
    )


def _computed_in(q: Tensor, block: Block, direction: str) -> torch.dtype:
    few = block.q1 - block.k0 <= _FEW_KEYS[direction]
    return torch.float32 if q.itemsize == 2 and few else q.dtype


def _expansion(q: Tensor, k: Tensor) -> int:
    """How often key/value heads must be repeated for torch's fused CPU attention."""
    return 1 if flash_reads_groups() else q.shape[1] // k.shape[1]


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the log-sum-exp of every block."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups, saved = _expansion(q, k), []
    for b in settings.blocks(q):
        dtype = _computed_in(q, b, "forward")
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(q, b.q0, b.q1, 1).to(dtype),
            heads_first(k, b.k0, b.q1, groups).to(dtype),
            heads_first(v, b.k0, b.q1, groups).to(dtype),
            0.0,
            b.mask is None,
            attn_mask=None if b.mask is None else b.mask.to(dtype),
            scale=settings.scale,
        )
        saved.append(lse)
        out[b.q0 : b.q1] = part.squeeze(0).transpose(0, 1)
    return out, saved


def cpu_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
    into: AttentionGradients | None = None,
) -> AttentionGradients:
    """dq, dk, dv, written into `into` where given (any strides)."""
    dq, dk, dv = into or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    windowed = settings.hiding_window is not None
    if windowed:
        dk.zero_()
        dv.zero_()
    groups, kv_heads = _expansion(q, k), k.shape[1]
    for index, b in enumerate(settings.blocks(q)):
        dtype = _computed_in(q, b, "backward")
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            heads_first(do, b.q0, b.q1, 1).to(dtype),
            heads_first(q, b.q0, b.q1, 1).to(dtype),
            heads_first(k, b.k0, b.q1, groups).to(dtype),
            heads_first(v, b.k0, b.q1, groups).to(dtype),
            heads_first(out, b.q0, b.q1, 1).to(dtype),
            saved[index],
            0.0,
            b.mask is None,
            attn_mask=None if b.mask is None else b.mask.to(dtype),
            scale=settings.scale,
        )
        dq[b.q0 : b.q1] = parts[0].squeeze(0).transpose(0, 1)
        for target, part in ((dk, parts[1]), (dv, parts[2])):
            if groups > 1:
                part = part.unflatten(1, (kv_heads, groups)).sum(2)
            gradient = part.squeeze(0).transpose(0, 1)
            if windowed:  # the keys of neighbouring blocks overlap
                target[b.k0 : b.q1] += gradient
            else:
                target[b.k0 : b.q1] = gradient
    return dq, dk, dv
