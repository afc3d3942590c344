"""Shapes of models to measure and check with, real or tiny."""

from __future__ import annotations

from dataclasses import replace

from engine.memory.model_shapes import preset_config, unknown_model
from models.config.model_config import ModelConfig


def configuration(model: str, small: bool) -> ModelConfig:
    """A preset's shape, or one of the same family that a processor core can run.

    Raises `ConfigError` for an unknown preset.
    """
    config = preset_config(model)
    if config is None:
        raise unknown_model(model)
    if not small:
        return config
    layers = 2 if config.period == 1 else config.period
    tiny = replace(
        config.with_layers(layers),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    if config.num_experts:
        tiny = replace(
            tiny,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=min(64, config.shared_expert_intermediate_size),
        )
    if "linear_attention" in config.layer_types:
        tiny = replace(
            tiny,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
    return tiny
