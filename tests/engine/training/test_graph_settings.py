"""`--cuda-graphs`: what it cannot be used with is refused before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.training.checks import check_run
from models.config.model_config import ModelConfig

GPU = torch.device("cuda")


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d.jsonl", "cuda_graphs": True, **changes})


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "full"}, "only an adapter's are small enough"),
        ({"offload": "checkpoints,weights"}, "offload checkpoints and offload weights"),
        ({"memory_budget": "8GiB"}, "memory_budget"),
    ],
)
def test_settings_that_move_memory_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        settings(**changes)


def test_a_processor_has_no_graphs() -> None:
    with pytest.raises(ConfigError, match="a run on the cpu"):
        check_run(settings(), shape(), torch.device("cpu"), torch.float32)


def test_a_model_of_which_nothing_can_be_recorded_is_refused() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    with pytest.raises(ConfigError, match="qwen3_moe"):
        check_run(settings(), shape(model_type="qwen3_moe", **experts), GPU, torch.float32)


def test_what_can_be_recorded_is_accepted() -> None:
    check_run(settings(), shape(), GPU, torch.float32)
    check_run(settings(cuda_graphs=False), shape(), torch.device("cpu"), torch.float32)
