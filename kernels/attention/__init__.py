"""Causal attention over packed documents, with grouped heads and an optional window.

Tokens of all documents lie one after another: q is (N, Hq, D), k and v are (N, Hkv, D), and
document d holds tokens cu_seqlens[d] to cu_seqlens[d + 1]. Query head h reads key/value head
h // (Hq / Hkv). A query at position i of its document sees positions j <= i and, with a window W,
only i - j < W (W keys, its own included). Documents never see each other.

    S = scale * q k^T + mask,   P = softmax(S),   o = P v
    dv = P^T do,  dS = P * (do v^T - rowsum(do * o)),  dq = scale dS k,  dk = scale dS^T q

What a batch needs to know of its documents is computed once (`AttentionPlan`), not per layer. On a
CPU each document (each block of queries, where there is a window) is one call of torch's fused
attention, whose backward reads the saved output and log-sum-exp, so nothing of size T^2 is saved.
On a GPU `kernels.attention.choice` chooses among torch's back ends, which save the same two.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.backends import Backend
from kernels.attention.cached import cached_attention
from kernels.attention.choice import select
from kernels.attention.cpu import cpu_backward, cpu_forward
from kernels.attention.documents import AttentionGradients, AttentionPlan, AttentionSettings
from kernels.attention.dropped import dropped_backward, dropped_forward
from kernels.attention.table import BACKENDS

__all__ = [
    "AttentionPlan",
    "AttentionSettings",
    "attention",
    "attention_backward",
    "attention_forward",
    "cached_attention",
    "writes_gradients",
]

_DROPPED = Backend("dropped", dropped_forward, dropped_backward, lambda q, k, settings: True)
_CPU = Backend("cpu", cpu_forward, cpu_backward, lambda q, k, settings: q.is_cpu, writes=True)


def _backend(q: Tensor, k: Tensor, settings: AttentionSettings) -> Backend:
    if settings.seed is not None:
        return _DROPPED
    name = settings.backend
    if name is None:
        return select(q, k, settings) if q.is_cuda else _CPU
    return _CPU if name == "cpu" else BACKENDS[name]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings
) -> tuple[Tensor, list[Tensor]]:
    """o (N, Hq, D) contiguous, and what the backward pass needs of the softmax.

    The second value holds a back end's own tensors (log-sum-exp, generator state).
    """
    shared = settings.plan.shared
    if shared is not None:
        whole = replace(settings, plan=settings.plan.whole)
        q, k, v = (shared.gathered(x) for x in (q, k, v))
        out, saved = attention_forward(q, k, v, whole)
        return shared.taken(out), saved
    return _backend(q, k, settings).forward(q, k, v, settings)


def writes_gradients(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    """Whether `attention_backward` saves memory by writing where it is told to.

    Else a back end makes gradients in memory of its own, which are copied there afterwards; what
    comes next may as well read them where they are.
    """
    if settings.plan.shared is not None:
        return False
    return settings.plan.frugal or _backend(q, k, settings).name == "cpu"


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
    into: AttentionGradients | None = None,
) -> AttentionGradients:
    """dq, dk, dv in the shapes of q, k, v; written into `into` where given (any strides)."""
    shared = settings.plan.shared
    if shared is None:
        backend = _backend(q, k, settings)
        if into is not None and backend.writes:
            return backend.backward(do, q, k, v, out, saved, settings, into)
        parts = backend.backward(do, q, k, v, out, saved, settings)
    else:
        whole = replace(settings, plan=settings.plan.whole)
        do, (q, k, v, out) = shared.spread(do), [shared.gathered(x) for x in (q, k, v, out)]
        dq, dk, dv = attention_backward(do, q, k, v, out, saved, whole)
        parts = shared.taken(dq), shared.folded(dk), shared.folded(dv)
    if into is None:
        return parts
    for target, part in zip(into, parts, strict=True):
        target.copy_(part)
    return into


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        settings: AttentionSettings,
    ) -> Tensor:
        out, saved = attention_forward(q, k, v, settings)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, out, *saved = ctx.saved_tensors
        return *attention_backward(do, q, k, v, out, saved, ctx.settings), None


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

    `scale` defaults to D^-1/2; `backend` as in `AttentionSettings`. Raises `ValueError` if Hkv
    does not divide Hq or the numbers of tokens differ.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected "
            "(N, Hq, D) and twice (N, Hkv, D) with Hkv dividing Hq"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out: Tensor = _Attention.apply(q, k, v, AttentionSettings(plan, window, scale, backend))
    return out
