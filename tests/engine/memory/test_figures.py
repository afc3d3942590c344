"""Published figures: what an 8B model needs on a GPU, and the longest rows that fit one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.memory.estimate import MemoryPlan, plan
from engine.memory.model_shapes import preset_config

GB = 10**9


def planned(tokens: int, **changes: Any) -> MemoryPlan:
    model = preset_config("llama-3.1-8b")
    assert model is not None
    config = TrainConfig(
        model="m",
        data="d",
        batch_size=1,
        max_length=tokens,
        gradient_checkpointing="full",
        embedding_on="host",
        offload=("checkpoints",),
        mlp_tile_tokens=512,
        loss_chunk_tokens=64,
        low_memory_decode=True,
        **changes,
    )
    return plan(model, config, gpu=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(("precision", "size"), [("16bit", 5.386), ("8bit", 4.861)])
def test_eight_billion_parameters_at_2048_tokens(precision: str, size: float) -> None:
    made = planned(2048, head_precision=precision)
    assert made.allocated / GB == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize(("gigabytes", "tokens"), [(8, 32_832), (24, 222_144), (80, 884_672)])
def test_the_longest_row_of_eight_billion_parameters(gigabytes: int, tokens: int) -> None:
    assert planned(tokens, head_precision="8bit").total / GB == pytest.approx(gigabytes, rel=0.005)
