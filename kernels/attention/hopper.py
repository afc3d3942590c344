"""Attention back ends for Hopper, of a recent torch or a package.

cudnn_varlen (torch 2.11 on) is cuDNN's attention over packed documents. cuDNN builds a plan for
every new number of documents and longest length, so both are rounded up: empty documents follow the
last. flash3 is FlashAttention-3, from its own package: torch routes flash attention's functions to
it once it is activated, for the whole process. Neither has been tried on a GPU by those who wrote
this: `kernels.attention.choice` takes one only after its trial, and `engine doctor --gpu` shows
what it answers.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.attention.backends import (
    HALF,
    Backend,
    Result,
    flash_backward,
    flash_forward,
    flash_suits,
)
from kernels.attention.documents import AttentionGradients, AttentionPlan, AttentionSettings
from kernels.runtime.device import architecture
from kernels.runtime.simulation import simulated_gpu
from kernels.runtime.triton_support import next_power_of_2

_HOPPER = 90
_FA3_MODULE = "flash_attn_interface"
_LEAST_DOCUMENTS, _LEAST_LONGEST = 8, 1024


def _on_hopper(q: Tensor) -> bool:
    """Whether q lies on a Hopper GPU, and on no simulated one."""
    return q.is_cuda and simulated_gpu() is None and architecture(q.device) // 10 * 10 == _HOPPER


def _varlen_suits(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    return (
        hasattr(torch.ops.aten, "_cudnn_attention_backward")
        and q.dtype in HALF
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 128
        and settings.hiding_window is None
        and not settings.plan.frugal  # nothing says how large its workspace is
        and _on_hopper(q)
    )


def padded_boundaries(plan: AttentionPlan, device: torch.device) -> tuple[Tensor, int]:
    """Boundaries with empty documents up to a power of two of them, and a longest length."""
    known = plan.boundaries(device)
    count = max(_LEAST_DOCUMENTS, next_power_of_2(plan.count))
    longest = max(_LEAST_LONGEST, next_power_of_2(plan.longest))
    empty = known[-1:].expand(count - plan.count)
    return torch.cat((known, empty)), longest


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Result:
    cu, longest = padded_boundaries(settings.plan, q.device)
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, cu, cu, longest, longest, True, 0.0, True, False, scale=settings.scale
    )
    return out.contiguous(), [lse, seed, offset]


def _varlen_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: list[Tensor],
    settings: AttentionSettings,
) -> AttentionGradients:
    lse, seed, offset = saved
    cu, longest = padded_boundaries(settings.plan, q.device)
    # None stands for the undefined tensor that autograd passes: no bias.
    parts = torch.ops.aten._cudnn_attention_backward(
        do, q, k, v, out, lse, seed, offset, None, cu, cu, longest, longest, 0.0, True,
        scale=settings.scale,
    )  # fmt: skip
    dq, dk, dv = parts
    return dq, dk, dv


@cache
def _fa3_installed() -> bool:
    registry: Any = torch.nn.attention
    listed: list[str] = getattr(registry, "list_flash_attention_impls", list)()
    return "FA3" in listed and importlib.util.find_spec(_FA3_MODULE) is not None


def _fa3_suits(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    return flash_suits(q, k, settings) and _on_hopper(q) and _fa3_installed()


@cache
def _activate_fa3() -> None:
    """Route torch's flash attention to FlashAttention-3. Raises where its package does not fit."""
    registry: Any = torch.nn.attention
    registry.activate_flash_attention_impl("FA3")


def _restore_fa2() -> None:
    """Route torch's flash attention to its own again, and do not come back to FA3."""
    registry: Any = torch.nn.attention
    if registry.current_flash_attention_impl() == "FA3":
        registry.restore_flash_attention_impl()


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Result:
    _activate_fa3()
    return flash_forward(q, k, v, settings)


VARLEN = Backend("cudnn_varlen", _varlen_forward, _varlen_backward, _varlen_suits)
FLASH3 = Backend(
    "flash3", _fa3_forward, flash_backward, _fa3_suits, writes=True, withdraw=_restore_fa2
)
