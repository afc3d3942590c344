"""Causal attention over packed documents, with grouped heads and an optional window.

Tokens of all documents lie one after another: q is (N, Hq, D), k and v are (N, Hkv, D), and
document d holds rows cu_seqlens[d] to cu_seqlens[d + 1]. Query head h reads key/value head
h // (Hq / Hkv). A query at position i of its document sees positions j <= i and, with a window W,
only i - j < W (W keys, its own included). Documents never see each other.

    S = scale * q k^T + mask,   P = softmax(S),   o = P v
    dv = P^T do,  dS = P * (do v^T - rowsum(do * o)),  dq = scale dS k,  dk = scale dS^T q

What a batch needs to know of its documents is computed once (`AttentionPlan`), not per layer. Each
document (each block of queries, where there is a window) is one call of torch's fused attention,
whose backward reads the saved output and log-sum-exp, so nothing of size T^2 is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from typing import Any

import torch
from torch import Tensor

_WINDOW_BLOCK = 256


@dataclass(frozen=True)
class AttentionPlan:
    """Document boundaries of one packed batch, on the device and as host integers."""

    cu_seqlens: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, tokens: int) -> AttentionPlan:
        """Read (D + 1,) int32 boundaries; the one host read of a batch.

        Raises `ValueError` unless they rise strictly from 0 to `tokens`.
        """
        bounds = tuple(int(bound) for bound in cu_seqlens.tolist())
        rising = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not rising:
            raise ValueError(
                f"cu_seqlens is {list(bounds)[:8]}; expected boundaries that rise strictly "
                f"from 0 to the number of tokens, {tokens}"
            )
        return cls(cu_seqlens.to(torch.int32), bounds)

    def documents(self) -> list[tuple[int, int]]:
        """(start, end) of every document."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))


@dataclass(frozen=True)
class _Block:
    """Queries [q0, q1) against keys [k0, q1); `mask` None means plain causal with k0 == q0."""

    q0: int
    q1: int
    k0: int
    mask: Tensor | None


def _blocks(plan: AttentionPlan, window: int | None, like: Tensor) -> list[_Block]:
    blocks = []
    for start, end in plan.documents():
        if window is None or end - start <= window:
            blocks.append(_Block(start, end, start, None))
            continue
        for q0 in range(start, end, _WINDOW_BLOCK):
            q1, k0 = min(q0 + _WINDOW_BLOCK, end), max(start, q0 - window + 1)
            blocks.append(_Block(q0, q1, k0, _window_mask(q1 - q0, q0 - k0, window, like)))
    return blocks


def _window_mask(queries: int, lead: int, window: int, like: Tensor) -> Tensor:
    """Additive mask (queries, lead + queries): key column c is at distance lead + row - c."""
    row = torch.arange(queries, device=like.device).unsqueeze(1)
    column = torch.arange(lead + queries, device=like.device).unsqueeze(0)
    distance = lead + row - column
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))


def _heads_first(x: Tensor, start: int, end: int, groups: int) -> Tensor:
    """Rows of x (N, H, D) as (1, H * groups, T, D)."""
    part = x[start:end].transpose(0, 1).unsqueeze(0)
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


@cache
def _cpu_flash_reads_groups() -> bool:
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


def _expansion(q: Tensor, k: Tensor) -> int:
    """How often key/value heads must be repeated for the fused op on this device."""
    groups = q.shape[1] // k.shape[1]
    return 1 if not q.is_cuda and _cpu_flash_reads_groups() else groups


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """o (N, Hq, D) contiguous, and what the backward pass needs of the softmax.

    The second value is one log-sum-exp per block on a CPU and empty elsewhere.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups, saved = _expansion(q, k), []
    for b in _blocks(plan, window, q):
        args = (
            _heads_first(q, b.q0, b.q1, 1),
            _heads_first(k, b.k0, b.q1, groups),
            _heads_first(v, b.k0, b.q1, groups),
        )
        if q.is_cuda:
            part = _sdpa(*args, b.mask, scale)
        else:
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *args, 0.0, b.mask is None, attn_mask=b.mask, scale=scale
            )
            saved.append(lse)
        out[b.q0 : b.q1] = part.squeeze(0).transpose(0, 1)
    return out, saved


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    plan: AttentionPlan,
    window: int | None,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; written into `grads` where given (any strides)."""
    dq, dk, dv = grads if grads is not None else (torch.empty_like(t) for t in (q, k, v))
    if window is not None:
        dk.zero_()
        dv.zero_()
    groups, kv_heads = _expansion(q, k), k.shape[1]
    for index, b in enumerate(_blocks(plan, window, q)):
        args = (
            _heads_first(q, b.q0, b.q1, 1),
            _heads_first(k, b.k0, b.q1, groups),
            _heads_first(v, b.k0, b.q1, groups),
        )
        d_out = _heads_first(do, b.q0, b.q1, 1)
        if q.is_cuda:
            parts = _sdpa_backward(d_out, args, b.mask, scale)
        else:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out,
                *args,
                _heads_first(out, b.q0, b.q1, 1),
                saved[index],
                0.0,
                b.mask is None,
                attn_mask=b.mask,
                scale=scale,
            )
        dq[b.q0 : b.q1] = parts[0].squeeze(0).transpose(0, 1)
        for target, part in ((dk, parts[1]), (dv, parts[2])):
            if groups > 1:
                part = part.unflatten(1, (kv_heads, groups)).sum(2)
            rows = part.squeeze(0).transpose(0, 1)
            if window is None:
                target[b.k0 : b.q1] = rows
            else:
                target[b.k0 : b.q1] += rows
    return dq, dk, dv


def _sdpa_backward(
    d_out: Tensor, args: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """Gradients by differentiating torch's attention anew, for back ends without a public pair."""
    leaves = [t.detach().requires_grad_(True) for t in args]
    with torch.enable_grad():
        out = _sdpa(leaves[0], leaves[1], leaves[2], mask, scale)
    return torch.autograd.grad(out, leaves, d_out)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        window: int | None,
        scale: float,
    ) -> Tensor:
        out, saved = attention_forward(q, k, v, plan, window, scale)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.plan, ctx.window, ctx.scale = plan, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        grads = attention_backward(do, q, k, v, out, saved, ctx.plan, ctx.window, ctx.scale)
        return *grads, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Packed causal attention: q (N, Hq, D), k and v (N, Hkv, D) -> (N, Hq, D).

    `scale` defaults to D^-1/2. Raises `ValueError` if Hkv does not divide Hq or the rows differ.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected "
            "(N, Hq, D) and twice (N, Hkv, D) with Hkv dividing Hq"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out: Tensor = _Attention.apply(q, k, v, plan, window, scale)
    return out


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
    groups = q.shape[1] // keys.shape[1]
    total = lead + queries
    mask = None
    if queries > 1:
        mask = _window_mask(queries, lead, window or total, q)
    out = torch.nn.functional.scaled_dot_product_attention(
        _heads_first(q, 0, queries, 1),
        _heads_first(keys, 0, total, groups),
        _heads_first(values, 0, total, groups),
        attn_mask=mask,
        scale=scale,
    )
    return out.squeeze(0).transpose(0, 1).contiguous()
