"""Batches are padded to few sizes, for which launches are recorded."""

import pytest
import torch

from kernels.attention.documents import AttentionPlan
from models.memory.cuda_graphs import Sizes


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 2048, 2049, 16384])
@pytest.mark.parametrize("documents", [1, 2, 9])
def test_sizes_hold_the_batch_and_are_few(tokens: int, documents: int) -> None:
    if tokens < documents:
        documents = 1
    bounds = torch.linspace(0, tokens, documents + 1).to(torch.int32)
    plan = AttentionPlan.from_cu_seqlens(bounds, tokens)
    sizes = Sizes.of(plan, tokens)
    assert 0 <= sizes.tokens - tokens <= max(63, tokens / 8)
    assert sizes.longest >= max(plan.longest, sizes.tokens - tokens)
    assert sizes.documents >= documents + (sizes.tokens > tokens)


def test_equal_documents_of_whole_blocks_are_not_padded() -> None:
    bounds = torch.arange(0, 5) * 4096
    sizes = Sizes.of(AttentionPlan.from_cu_seqlens(bounds.to(torch.int32), 16384), 16384)
    assert sizes == Sizes(16384, 4, 4096, equal=True)
