"""torch's attention back ends for a GPU, the fastest first."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.backends import (
    Backend,
    cudnn_backward,
    cudnn_forward,
    cudnn_suits,
    efficient_backward,
    efficient_forward,
    efficient_suits,
    flash_backward,
    flash_forward,
    flash_suits,
)
from kernels.attention.documents import AttentionSettings
from kernels.attention.hopper import FLASH3, VARLEN
from kernels.attention.reference import documents_backward, documents_forward


def _documents_suit(q: Tensor, k: Tensor, settings: AttentionSettings) -> bool:
    return settings.plan.most is None


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cudnn", cudnn_forward, cudnn_backward, cudnn_suits),
        FLASH3,
        VARLEN,
        Backend("flash", flash_forward, flash_backward, flash_suits, writes=True, repeats=True),
        Backend("efficient", efficient_forward, efficient_backward, efficient_suits, repeats=True),
        Backend("documents", documents_forward, documents_backward, _documents_suit, repeats=True),
    )
}
"""By name, the fastest first."""
