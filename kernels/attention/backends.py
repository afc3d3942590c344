"""torch's attention back ends on a GPU, and the choice among them by trying.

    name        packed documents by         takes                            what backward reads
    cudnn       a batch of equal lengths    16 bit, no window                out, lse, seed, offset
    flash       boundaries (varlen)         16 bit, D <= 256, window         out, lse, state
    efficient   boundaries (varlen)         16 or 32 bit, window             out, lse, seed, offset
    documents   one call per block          all but open plans               q, k, v (recomputes)

The order is that of speed; cuDNN goes first only where torch's own chooser prefers it to flash for
this problem. Nothing is decided by a version: a back end is used for a type, head count, head
dimension and device only after it solved a small problem of that kind, forward and backward, and
agreed with plain arithmetic (documents apart, window exact). That costs a few small launches once
per process. `ENGINE_ATTENTION=name` chooses on purpose, without a trial: what cannot run then
raises. `explain` says what each back end answered.

flash and efficient are the functions behind `torch.nn.attention.varlen.varlen_attn` and
`scaled_dot_product_attention`; called directly, they hand out what backward needs, so that a
checkpointing policy can keep it. None of them waits for the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from kernels.attention.documents import AttentionPlan
from kernels.attention.reference import documents_backward, documents_forward

_HALF = (torch.float16, torch.bfloat16)
_INT32_ELEMENTS = 2**31
_FRUGAL_ELEMENTS = 2**23
_CUDNN_GRANULE = 128
_CAUSAL = 1
"""`efficient`'s number for a causal mask."""

_log = logging.getLogger(__name__)

Result = tuple[Tensor, list[Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Backend:
    """A pair of functions and the problems they are made for.

    `forward(q, k, v, plan, window, scale)` returns (out, saved);
    `backward(do, q, k, v, out, saved, plan, window, scale)` returns (dq, dk, dv); where it `writes`
    it takes three tensors `into` which it writes instead.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, AttentionPlan, int | None, float], Result]
    backward: Callable[..., Gradients]
    suits: Callable[[Tensor, Tensor, AttentionPlan, int | None], bool]
    writes: bool = False


def _batched(x: Tensor, plan: AttentionPlan) -> Tensor:
    """(N, H, D) as (documents, H, T, D), for documents of equal length."""
    return x.view(plan.count, -1, *x.shape[1:]).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """(documents, H, T, D) as contiguous (N, H, D)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _cudnn_suits(q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None) -> bool:
    """Fixed token budgets only: cuDNN builds a plan of its own for every new length."""
    length = plan.equal_length
    return (
        q.dtype in _HALF
        and q.shape[2] % 8 == 0
        and length is not None
        and length % _CUDNN_GRANULE == 0
        and plan.window(window) is None
        and not plan.frugal  # its workspace is its own secret
    )


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> Result:
    q, k, v = (_batched(x, plan) for x in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return _packed(out), [lse, seed, offset]


def _cudnn_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    plan: AttentionPlan,
    window: int | None,
    scale: float,
) -> Gradients:
    lse, seed, offset = saved
    do, q, k, v, out = (_batched(x, plan) for x in (do, q, k, v, out))
    # None stands for the undefined tensors that autograd passes: no bias, no boundaries.
    parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, lse, seed, offset, None, None, None, q.shape[2], k.shape[2],
        0.0, True, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (_packed(x) for x in parts)
    return dq, dk, dv


def _flash_suits(q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None) -> bool:
    return q.dtype in _HALF and q.shape[2] <= 256 and q.shape[2] % 8 == 0


def _head_slices(q: Tensor, k: Tensor, plan: AttentionPlan) -> list[tuple[slice, slice]]:
    """Heads of q and of k, v for each call, so that no call's fp32 dQ has 2^31 elements.

    For a frugal batch it has no more than `_FRUGAL_ELEMENTS`, where one group of heads allows that.
    The backward pass of flash attention 2 pads every document of dQ to 128 rows more and every
    head to a multiple of 32, and has indexed it in 32 bits. Raises `ValueError` if one group of
    heads is already too large.
    """
    groups, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    rows = q.shape[0] + 128 * plan.count
    per_group = rows * groups * (-(-q.shape[2] // 32) * 32)
    if per_group >= _INT32_ELEMENTS:
        raise ValueError(
            f"{q.shape[0]} tokens with {groups} query heads of {q.shape[2]} on each key/value head "
            "are more than flash attention can index; split the batch"
        )
    step = min(kv_heads, (_INT32_ELEMENTS - 1) // per_group)
    if plan.frugal:
        calls = -(-kv_heads // max(1, min(step, _FRUGAL_ELEMENTS // per_group)))
        step = -(-kv_heads // calls)
    starts = range(0, kv_heads, step)
    return [(slice(h * groups, (h + step) * groups), slice(h, h + step)) for h in starts]


def _taken(x: Tensor, heads: slice) -> Tensor:
    return x if heads.stop - heads.start >= x.shape[1] else x[:, heads]


def _flash_arguments(
    q: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> tuple[list[Any], dict[str, Any]]:
    window = plan.window(window)
    cu_seqlens, longest = plan.boundaries(q.device), plan.longest
    left = -1 if window is None else window - 1
    options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
    return [cu_seqlens, cu_seqlens, longest, longest, 0.0, window is None], options


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> Result:
    arguments, options = _flash_arguments(q, plan, window, scale)
    slices = _head_slices(q, k, plan)
    whole = q.new_empty(q.shape) if len(slices) > 1 else None
    saved: list[Tensor] = []
    for heads, kv in slices:
        out, *state, _ = torch.ops.aten._flash_attention_forward(
            _taken(q, heads), _taken(k, kv), _taken(v, kv), *arguments, False, **options
        )
        saved += state
        if whole is not None:
            whole[:, heads] = out
    return (out.contiguous() if whole is None else whole), saved


def _flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    plan: AttentionPlan,
    window: int | None,
    scale: float,
    into: Gradients | None = None,
) -> Gradients:
    arguments, options = _flash_arguments(q, plan, window, scale)
    slices = _head_slices(q, k, plan)
    if into is None and len(slices) > 1:
        into = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for index, (heads, kv) in enumerate(slices):
        lse, state, unused = saved[3 * index : 3 * index + 3]
        wanted = ((do, heads), (q, heads), (k, kv), (v, kv), (out, heads))
        inputs = [_taken(x, part) for x, part in wanted]
        parts = torch.ops.aten._flash_attention_backward(
            *inputs, lse, *arguments, state, unused, **options
        )
        if into is None:
            dq, dk, dv = parts
            return dq, dk, dv
        for target, part, of in zip(into, parts, (heads, kv, kv), strict=True):
            _taken(target, of).copy_(part)
        del parts
    assert into is not None
    return into


def _efficient_suits(q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None) -> bool:
    return q.dtype in (*_HALF, torch.float32) and q.shape[2] % 8 == 0


def _wide(x: Tensor, groups: int) -> Tensor:
    """(N, Hkv, D) as (1, N, Hq, D)."""
    return (x if groups == 1 else x.repeat_interleave(groups, 1)).unsqueeze(0)


def _efficient_options(plan: AttentionPlan, window: int | None, scale: float) -> dict[str, Any]:
    window = plan.window(window)
    return {"scale": scale} | ({} if window is None else {"window_size": window})


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None, scale: float
) -> Result:
    groups, cu_seqlens = q.shape[1] // k.shape[1], plan.boundaries(q.device)
    out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
        q.unsqueeze(0), _wide(k, groups), _wide(v, groups), None, cu_seqlens, cu_seqlens,
        plan.longest, plan.longest, 0.0, _CAUSAL, True, **_efficient_options(plan, window, scale),
    )  # fmt: skip
    return out.squeeze(0).contiguous(), [lse, seed, offset]


def _efficient_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    plan: AttentionPlan,
    window: int | None,
    scale: float,
) -> Gradients:
    lse, seed, offset = saved
    groups, cu_seqlens = q.shape[1] // k.shape[1], plan.boundaries(q.device)
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        do.unsqueeze(0), q.unsqueeze(0), _wide(k, groups), _wide(v, groups), None,
        out.unsqueeze(0), cu_seqlens, cu_seqlens, plan.longest, plan.longest, lse, 0.0, seed,
        offset, _CAUSAL, False, **_efficient_options(plan, window, scale),
    )  # fmt: skip
    dq, dk, dv = (x.squeeze(0) for x in (dq, dk, dv))
    if groups > 1:
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _documents_suit(q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None) -> bool:
    return plan.most is None


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cudnn", _cudnn_forward, _cudnn_backward, _cudnn_suits),
        Backend("flash", _flash_forward, _flash_backward, _flash_suits, writes=True),
        Backend("efficient", _efficient_forward, _efficient_backward, _efficient_suits),
        Backend("documents", documents_forward, documents_backward, _documents_suit),
    )
}
"""By name, the fastest first."""


@dataclass(frozen=True)
class Kind:
    """What a trial stands for: problems that differ only in their documents."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    windowed: bool
    open: bool = False


_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 5e-3}
"""Of the largest value. A leak between documents or a window off by one is an error near 1."""


def _sample(kind: Kind, name: str) -> tuple[AttentionPlan, int | None, list[Tensor]]:
    """A small problem of `kind`: its documents, window, and q, k, v, do."""
    bounds = [0, 128, 256] if name == "cudnn" else [0, 5, 135, 196]
    plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), bounds[-1])
    generator = torch.Generator().manual_seed(0)
    heads = (kind.heads, kind.kv_heads, kind.kv_heads, kind.heads)
    values = [
        torch.randn(bounds[-1], h, kind.head_dim, generator=generator, device="cpu") for h in heads
    ]
    return plan, 37 if kind.windowed else None, [x.to(kind.device, kind.dtype) for x in values]


def _opened(plan: AttentionPlan, device: torch.device) -> AttentionPlan:
    """The same documents, which the host does not know, and three empty ones."""
    padded = [*plan.bounds, *[plan.bounds[-1]] * 3]
    cu_seqlens = torch.tensor(padded, dtype=torch.int32, device=device)
    return AttentionPlan.within(cu_seqlens, 2 * plan.longest)


@cache
def trial(name: str, kind: Kind) -> str:
    """ "ok", or why the back end `name` does not serve problems of `kind`."""
    plan, window, (q, k, v, do) = _sample(kind, name)
    backend, scale = BACKENDS[name], kind.head_dim**-0.5
    given = _opened(plan, kind.device) if kind.open else plan
    try:
        out, saved = backend.forward(q, k, v, given, window, scale)
        got = (out, *backend.backward(do, q, k, v, out, saved, given, window, scale))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    q, k, v, do = (x.cpu().double() for x in (q, k, v, do))
    truth, _ = documents_forward(q, k, v, plan, window, scale)
    want = (truth, *documents_backward(do, q, k, v, truth, [], plan, window, scale))
    for value, true, what in zip(got, want, ("out", "dq", "dk", "dv"), strict=True):
        worst = float((value.cpu().double() - true).abs().max() / true.abs().max())
        if not worst <= _TOLERANCE[kind.dtype]:
            return f"{what} is wrong by {worst:.1e} of its largest value"
    return "ok"


@cache
def _torch_prefers_cudnn(kind: Kind) -> bool:
    """Whether torch's own chooser takes cuDNN for a batch of this kind."""
    chooser = getattr(torch, "_fused_sdp_choice", None)
    if chooser is None:
        return False
    q = torch.empty(2, kind.heads, 1024, kind.head_dim, dtype=kind.dtype, device=kind.device)
    q.requires_grad_(True)
    choice: int = chooser(q, q, q, None, 0.0, True)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _kind(q: Tensor, k: Tensor, windowed: bool, open_: bool = False) -> Kind:
    return Kind(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], windowed, open_)


def _works(backend: Backend, kind: Kind) -> bool:
    if backend.name == "documents":
        return True
    if backend.name == "cudnn" and not _torch_prefers_cudnn(kind):
        return False
    return trial(backend.name, kind) == "ok"


@cache
def _announce(name: str, kind: Kind) -> None:
    _log.info("attention runs as %s for %s", name, kind)


def select(q: Tensor, k: Tensor, plan: AttentionPlan, window: int | None) -> Backend:
    """The first back end that suits this problem and has proved that it solves its kind.

    Meta tensors, on which nothing can be tried, get flash where it suits, else documents.
    """
    forced = os.environ.get("ENGINE_ATTENTION")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"ENGINE_ATTENTION is {forced!r}; expected one of {list(BACKENDS)}")
        return BACKENDS[forced]
    if q.is_meta:
        return BACKENDS["flash" if _flash_suits(q, k, plan, window) else "documents"]
    kind = _kind(q, k, plan.window(window) is not None, plan.most is not None)
    for backend in BACKENDS.values():
        if backend.suits(q, k, plan, window) and _works(backend, kind):
            _announce(backend.name, kind)
            return backend
    raise RuntimeError(f"no attention back end for {kind}: {explain(q, k)}")


def explain(q: Tensor, k: Tensor, windowed: bool = False) -> dict[str, str]:
    """What every back end answers to a trial on the device and in the type and shape of q, k."""
    kind = _kind(q, k, windowed)
    return {name: trial(name, kind) for name in BACKENDS}
