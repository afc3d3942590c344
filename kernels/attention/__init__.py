"""Causal attention over packed documents, with grouped heads and an optional window.

Tokens of all documents lie one after another: q is (N, Hq, D), k and v are (N, Hkv, D), and
document d holds rows cu_seqlens[d] to cu_seqlens[d + 1]. Query head h reads key/value head
h // (Hq / Hkv). A query at position i of its document sees positions j <= i and, with a window W,
only i - j < W (W keys, its own included). Documents never see each other.

    S = scale * q k^T + mask,   P = softmax(S),   o = P v
    dv = P^T do,  dS = P * (do v^T - rowsum(do * o)),  dq = scale dS k,  dk = scale dS^T q

What a batch needs to know of its documents is computed once (`AttentionPlan`), not per layer. On a
CPU each document (each block of queries, where there is a window) is one call of torch's fused
attention, whose backward reads the saved output and log-sum-exp, so nothing of size T^2 is kept.
On a GPU `kernels.attention.backends` chooses among torch's back ends, which keep the same two.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.attention import backends as attention_backends
from kernels.attention.documents import AttentionPlan, window_mask

__all__ = [
    "AttentionPlan",
    "attention",
    "attention_backward",
    "attention_forward",
    "cached_attention",
]


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
    """How often key/value heads must be repeated for torch's fused CPU attention."""
    return 1 if _cpu_flash_reads_groups() else q.shape[1] // k.shape[1]


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the log-sum-exp of every block."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    window = plan.window(window)
    groups, saved = _expansion(q, k), []
    for b in plan.blocks(window, q):
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q, b.q0, b.q1, 1),
            _heads_first(k, b.k0, b.q1, groups),
            _heads_first(v, b.k0, b.q1, groups),
            0.0,
            b.mask is None,
            attn_mask=b.mask,
            scale=scale,
        )
        saved.append(lse)
        out[b.q0 : b.q1] = part.squeeze(0).transpose(0, 1)
    return out, saved


def _cpu_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    plan: AttentionPlan,
    window: int | None,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    dq, dk, dv = grads
    window = plan.window(window)
    if window is not None:
        dk.zero_()
        dv.zero_()
    groups, kv_heads = _expansion(q, k), k.shape[1]
    for index, b in enumerate(plan.blocks(window, q)):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(do, b.q0, b.q1, 1),
            _heads_first(q, b.q0, b.q1, 1),
            _heads_first(k, b.k0, b.q1, groups),
            _heads_first(v, b.k0, b.q1, groups),
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


def _backend(
    name: str | None, q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None
) -> attention_backends.Backend | None:
    """The back end to run; None is the CPU's own way."""
    if name is not None:
        return None if name == "cpu" else attention_backends.BACKENDS[name]
    return attention_backends.select(q, k, plan, window) if q.is_cuda else None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    window: int | None,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """o (N, Hq, D) contiguous, and what the backward pass needs of the softmax.

    The second value holds a back end's own tensors (log-sum-exp, generator state); the same
    `backend` must get them back. None chooses: "cpu" on a CPU, else the best that works of
    `kernels.attention.backends.BACKENDS`.
    """
    chosen = _backend(backend, q, k, plan, window)
    if chosen is None:
        return _cpu_forward(q, k, v, plan, window, scale)
    return chosen.forward(q, k, v, plan, window, scale)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; written into `grads` where given (any strides)."""
    chosen = _backend(backend, q, k, plan, window)
    if chosen is None:
        into = grads if grads is not None else _like(q, k, v)
        _cpu_backward(do, q, k, v, out, saved, plan, window, scale, into)
        return into
    if grads is not None and chosen.writes:
        return chosen.backward(do, q, k, v, out, saved, plan, window, scale, grads)
    parts = chosen.backward(do, q, k, v, out, saved, plan, window, scale)
    if grads is None:
        return parts
    for target, part in zip(grads, parts, strict=True):
        target.copy_(part)
    return grads


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        window: int | None,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        out, saved = attention_forward(q, k, v, plan, window, scale, backend)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.given = (plan, window, scale, None, backend)
        return out

    @staticmethod
    def backward(ctx, do: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, out, *saved = ctx.saved_tensors
        grads = attention_backward(do, q, k, v, out, saved, *ctx.given)
        return *grads, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Packed causal attention: q (N, Hq, D), k and v (N, Hkv, D) -> (N, Hq, D).

    `scale` defaults to D^-1/2; `backend` as for `attention_forward`. Raises `ValueError` if Hkv
    does not divide Hq or the rows differ.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected "
            "(N, Hq, D) and twice (N, Hkv, D) with Hkv dividing Hq"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out: Tensor = _Attention.apply(q, k, v, plan, window, scale, backend)
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
    groups, total = q.shape[1] // keys.shape[1], lead + queries
    if queries == 1:
        # The heads of a group stand in as queries of their one key/value head: no cache is copied.
        newest = q.view(1, keys.shape[1], groups, q.shape[2])
        keys, values = _heads_first(keys, 0, total, 1), _heads_first(values, 0, total, 1)
        out = torch.nn.functional.scaled_dot_product_attention(newest, keys, values, scale=scale)
        return out.reshape(q.shape)
    out = torch.nn.functional.scaled_dot_product_attention(
        _heads_first(q, 0, queries, 1),
        _heads_first(keys, 0, total, groups),
        _heads_first(values, 0, total, groups),
        attn_mask=window_mask(queries, lead, window or total, q),
        scale=scale,
    )
    return out.squeeze(0).transpose(0, 1).contiguous()
