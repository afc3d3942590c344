"""Documents that share their first tokens: as if every document had its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionPlan, attention
from kernels.attention.shared import SharedTokens, prompts_shared

BOUNDS = (0, 9, 16, 21, 29)
PROMPTS = (5, 0)


def layout() -> tuple[AttentionPlan, AttentionPlan]:
    """The documents with all their tokens, and with what the first two share held once."""
    whole = AttentionPlan.from_cu_seqlens(torch.tensor(BOUNDS), BOUNDS[-1])
    shared = SharedTokens(*prompts_shared(BOUNDS, PROMPTS))
    return whole, AttentionPlan(whole.cu_seqlens, whole.bounds, shared=shared)


@pytest.mark.parametrize("window", [None, 4])
def test_output_and_gradients_are_those_of_whole_documents(window: int | None) -> None:
    whole, plan = layout()
    shared = plan.shared
    assert shared is not None
    generator = torch.Generator().manual_seed(1)
    shapes = ((24, 4, 8), (24, 2, 8), (24, 2, 8), (24, 4, 8))
    q, k, v, do = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    ours = [x.clone().requires_grad_(True) for x in (q, k, v)]
    out = attention(*_three(ours), plan, window=window)
    got = torch.autograd.grad(out, ours, do)
    theirs = [x.clone().requires_grad_(True) for x in (q, k, v)]
    wide = [x.index_select(0, shared.source) for x in theirs]
    want_out = attention(*_three(wide), whole, window=window).index_select(0, shared.own)
    want = torch.autograd.grad(want_out, theirs, do)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def _three(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = parts
    return q, k, v


def test_tokens_are_laid_out_prompt_chosen_rejected() -> None:
    shared = SharedTokens(*prompts_shared(BOUNDS, PROMPTS))
    assert shared.source.tolist() == [
        *range(9), *range(5), 9, 10, *range(11, 16), *range(16, 24)
    ]  # fmt: skip
    assert shared.own.tolist() == [*range(9), 14, 15, *range(16, 29)]
    assert shared.copies.tolist() == [*range(9, 14)]
