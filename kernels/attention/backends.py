"""torch's attention back ends for a GPU.

    name        packed documents by         takes                            what backward reads
    cudnn       a batch of equal lengths    16 bit, no window                out, lse, seed, offset
    flash3, cudnn_varlen                    see `kernels.attention.hopper`
    flash       boundaries (varlen)         16 bit, D <= 256, window         out, lse, state
    efficient   boundaries (varlen)         16 or 32 bit, window             out, lse, seed, offset
    documents   one call per block          all but open plans               q, k, v (recomputes)

The order is that of speed (`kernels.attention.table`); `kernels.attention.choice` chooses.

flash and efficient are the functions behind `torch.nn.attention.varlen.varlen_attn` and
`scaled_dot_product_attention`; called directly, they hand out what backward needs, so that a
checkpointing policy can keep it. None of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.documents import AttentionGradients, AttentionPlan, AttentionSettings

HALF = (torch.float16, torch.bfloat16)
_INT32_ELEMENTS = 2**31
_CUDNN_GRANULE = 128
_CAUSAL = 1
"""`efficient`'s number for a causal mask."""

Result = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Backend:
    """A pair of functions and the problems they are made for.

    `forward(q, k, v, settings)` returns (out, saved);
    `backward(do, q, k, v, out, saved, settings)` returns (dq, dk, dv); where it `writes` it takes
    three tensors `into` which it writes instead. Where it `repeats`, its backward pass gives equal
    bits for equal inputs in torch's deterministic mode. `withdraw` takes back what it turned on in
    torch; it is called where a trial fails.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, AttentionSettings], Result]
    backward: Callable[..., AttentionGradients]
    suits: Callable[[Tensor, Tensor, AttentionSettings], bool]
    writes: bool = False
    repeats: bool = False
    withdraw: Callable[[], None] | None = None


def _batched(x: Tensor, plan: AttentionPlan) -> Tensor:
    """(N, H, D) as (documents, H, T, D), for documents of equal length."""
    return x.view(plan.count, -1, *x.shape[1:]).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """(documents, H, T, D) as contiguous (N, H, D)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def cudnn_suits(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    """Fixed token budgets only: cuDNN builds a plan of its own for every new length."""
    length = settings.plan.equal_length
    return (
        q.dtype in HALF
        and q.shape[2] % 8 == 0
        and length is not None
        and length % _CUDNN_GRANULE == 0
        and settings.hiding_window is None
        and not settings.plan.frugal  # nothing says how large its workspace is
    )


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Result:
    q, k, v = (_batched(x, settings.plan) for x in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=settings.scale
    )
    return _packed(out), [lse, seed, offset]


def cudnn_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
) -> AttentionGradients:
    lse, seed, offset = saved
    do, q, k, v, out = (_batched(x, settings.plan) for x in (do, q, k, v, out))
    # None stands for the undefined tensors that autograd passes: no bias, no boundaries.
    parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, lse, seed, offset, None, None, None, q.shape[2], k.shape[2],
        0.0, True, scale=settings.scale,
    )  # fmt: skip
    dq, dk, dv = (_packed(x) for x in parts)
    return dq, dk, dv


def flash_suits(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    return q.dtype in HALF and q.shape[2] <= 256 and q.shape[2] % 8 == 0


def _head_slices(q: Tensor, k: Tensor, plan: AttentionPlan) -> list[tuple[slice, slice]]:
    """Heads of q and of k, v for each call, so that no call's fp32 dQ has 2^31 elements.

    A frugal batch takes one group of heads at a time whatever its length: with more of them where
    rows are short, a shorter row would need more memory than a longer one. The backward pass of
    flash attention 2 pads every document of dQ to 128 rows more and every head to a multiple of
    32, and has indexed it in 32 bits. Raises `ValueError` if one group of heads is already too
    large.
    """
    groups, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    rows = q.shape[0] + 128 * plan.count
    per_group = rows * groups * (-(-q.shape[2] // 32) * 32)
    if per_group >= _INT32_ELEMENTS:
        raise ValueError(
            f"{q.shape[0]} tokens with {groups} query heads of {q.shape[2]} on each key/value head "
            "are more than flash attention can index; split the batch"
        )
    step = 1 if plan.frugal else min(kv_heads, (_INT32_ELEMENTS - 1) // per_group)
    starts = range(0, kv_heads, step)
    return [(slice(h * groups, (h + step) * groups), slice(h, h + step)) for h in starts]


def _taken(x: Tensor, heads: slice) -> Tensor:
    return x if heads.stop - heads.start >= x.shape[1] else x[:, heads]


def _flash_arguments(q: Tensor, settings: AttentionSettings) -> tuple[list[Any], dict[str, Any]]:
    plan, window = settings.plan, settings.hiding_window
    cu_seqlens, longest = plan.boundaries(q.device), plan.longest
    left = -1 if window is None else window - 1
    options = {"scale": settings.scale, "window_size_left": left, "window_size_right": 0}
    return [cu_seqlens, cu_seqlens, longest, longest, 0.0, window is None], options


def flash_forward(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Result:
    arguments, options = _flash_arguments(q, settings)
    slices = _head_slices(q, k, settings.plan)
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


def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
    into: AttentionGradients | None = None,
) -> AttentionGradients:
    arguments, options = _flash_arguments(q, settings)
    slices = _head_slices(q, k, settings.plan)
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


def efficient_suits(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    return q.dtype in (*HALF, torch.float32) and q.shape[2] % 8 == 0


def _wide(x: Tensor, groups: int) -> Tensor:
    """(N, Hkv, D) as (1, N, Hq, D)."""
    return (x if groups == 1 else x.repeat_interleave(groups, 1)).unsqueeze(0)


def _efficient_options(settings: AttentionSettings) -> dict[str, Any]:
    window = settings.hiding_window
    return {"scale": settings.scale} | ({} if window is None else {"window_size": window})


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Result:
    plan = settings.plan
    groups, cu_seqlens = q.shape[1] // k.shape[1], plan.boundaries(q.device)
    out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
        q.unsqueeze(0), _wide(k, groups), _wide(v, groups), None, cu_seqlens, cu_seqlens,
        plan.longest, plan.longest, 0.0, _CAUSAL, True, **_efficient_options(settings),
    )  # fmt: skip
    return out.squeeze(0).contiguous(), [lse, seed, offset]


def efficient_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
) -> AttentionGradients:
    lse, seed, offset = saved
    plan = settings.plan
    groups, cu_seqlens = q.shape[1] // k.shape[1], plan.boundaries(q.device)
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        do.unsqueeze(0), q.unsqueeze(0), _wide(k, groups), _wide(v, groups), None,
        out.unsqueeze(0), cu_seqlens, cu_seqlens, plan.longest, plan.longest, lse, 0.0, seed,
        offset, _CAUSAL, False, **_efficient_options(settings),
    )  # fmt: skip
    dq, dk, dv = (x.squeeze(0) for x in (dq, dk, dv))
    if groups > 1:
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv
