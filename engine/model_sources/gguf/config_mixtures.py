"""Configuration keys of GGUF mixtures of experts and hybrids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.metadata import Keys

TensorShapes = Mapping[str, tuple[int, ...]]
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
MIXTURES = ("qwen2moe", "qwen3moe", "qwen3next", "qwen35moe")


def mixture(arch: str, keys: Keys, shapes: TensorShapes, layers: int) -> dict[str, Any]:
    """The router and the experts. llama.cpp's graphs fix whether their weights are renormalised."""
    if keys.number("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise ConfigError(
            f"{keys.source}: its experts' weights are scaled by "
            f"{keys.number('expert_weights_scale')}, which is not supported."
        )
    sparse = [n for n in range(layers) if f"blk.{n}.ffn_gate_inp.weight" in shapes]
    if not sparse:
        raise CheckpointError(f"{keys.source} is a mixture of experts without any router.")
    first = f"blk.{sparse[0]}."
    config: dict[str, Any] = {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": _rows(keys, shapes, f"{first}ffn_down_exps.weight", -1),
        "norm_topk_prob": arch != "qwen2moe",
    }
    if arch != "qwen35moe":
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [n for n in range(layers) if n not in sparse]
    if arch != "qwen3moe":
        inner = _rows(keys, shapes, f"{first}ffn_gate_shexp.weight", 0)
        config["shared_expert_intermediate_size"] = inner
    return config


def hybrid(keys: Keys, shapes: TensorShapes, layers: int) -> dict[str, Any]:
    """Gated DeltaNet, and which layers have it.

    That is read off the tensors: converters have written an interval that is not the model's.
    """
    heads, inner = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if heads < 1 or inner % heads:
        raise CheckpointError(
            f"{keys.source}: {heads} value heads cannot share ssm.inner_size, {inner}."
        )
    return {
        "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel"),
        "linear_key_head_dim": keys.integer("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_num_key_heads": keys.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "layer_types": [
            "linear_attention" if f"blk.{n}.ssm_a" in shapes else "full_attention"
            for n in range(layers)
        ],
    }


def _rows(keys: Keys, shapes: TensorShapes, name: str, dimension: int) -> int:
    if name not in shapes or len(shapes[name]) < 2:
        raise CheckpointError(f"{keys.source} has no matrix {name}, of a mixture of experts.")
    return shapes[name][dimension]
