"""Metadata of a GGUF file: a model's shape, as llama.cpp reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.model_sources.gguf.config import ARCHITECTURES
from models.config.model_config import ModelConfig

_BY_MODEL_TYPE = {model_type: arch for arch, (model_type, _) in ARCHITECTURES.items()} | {
    "mistral": "llama",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
}
_DELTA_NET = ("qwen3next", "qwen35", "qwen35moe")


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a model's architecture. Raises `ConfigError` where it has none."""
    if config.model_type not in _BY_MODEL_TYPE:
        raise ConfigError(
            f"A {config.model_type} model has no architecture in llama.cpp that is known here; "
            f"exported are {', '.join(_BY_MODEL_TYPE)}. `engine merge` writes a Hugging Face "
            "directory."
        )
    if config.num_attention_heads_per_layer:
        raise ConfigError(
            "This model's layers have different numbers of attention heads (pruned with "
            "--per-layer), which llama.cpp does not read. Prune without --per-layer, or with "
            "--mode zero."
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "llama3", "linear", "yarn"):
        raise ConfigError(
            f"This model's rotary scaling is {rope!r}; llama.cpp reads linear, yarn and llama3 "
            "scaling. Export it without the scaling, for texts within its original length."
        )
    arch = _BY_MODEL_TYPE[config.model_type]
    if config.sparse_layers and arch in ("qwen2moe", "qwen3moe") and not all(config.sparse_layers):
        raise ConfigError(
            "Some layers of this mixture are dense, which llama.cpp's graph of its family is not."
        )
    every_fourth = tuple((n + 1) % 4 != 0 for n in range(config.num_hidden_layers))
    if arch == "smollm3" and config.rope_layers != every_fourth:
        raise ConfigError(
            "This SmolLM3 rotates other layers than all but every fourth, which is what llama.cpp "
            "computes."
        )
    return arch


def shape_metadata(config: ModelConfig) -> dict[str, Any]:
    """Key -> value, the keys without the name of the architecture before them."""
    arch = architecture(config)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": usable_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    keys |= _rope(config)
    if config.num_experts:
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
        _check_routing(arch, config)
    if config.shared_expert_intermediate_size:
        inner = config.shared_expert_intermediate_size
        keys["expert_shared_feed_forward_length"] = inner
    return keys | (_delta_net(config) if arch in _DELTA_NET else {})


def usable_length(config: ModelConfig) -> int:
    """The longest text that llama.cpp computes as the model does.

    Its graphs of these architectures attend to every earlier token: beyond a sliding window the
    answers would differ.
    """
    slides = "sliding_attention" in config.layer_types and config.sliding_window
    longest = config.max_position_embeddings
    return min(longest, config.sliding_window) if slides and config.sliding_window else longest


def _check_routing(arch: str, config: ModelConfig) -> None:
    """llama.cpp's graphs fix whether the weights of the chosen experts are renormalised."""
    if config.norm_topk_prob != (arch != "qwen2moe"):
        raise ConfigError(
            f"norm_topk_prob is {str(config.norm_topk_prob).lower()} in this model, and llama.cpp "
            f"computes every {arch} model as if it were the other."
        )


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    rotated = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    keys: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": rotated,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        keys["rope.scaling.original_context_length"] = int(original)
        for name, key in (
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.get(name) is not None:
                keys[f"rope.scaling.{key}"] = float(rope[name])
    if _BY_MODEL_TYPE[config.model_type] in ("qwen35", "qwen35moe"):
        # The axes of a picture's positions share the rotated pairs; of a text they are all equal.
        sections = list(rope.get("mrope_section") or (11, 11, 10))
        sections = sections if 2 * sum(sections) <= rotated else [rotated // 2, 0, 0]
        keys["rope.dimension_sections"] = [*sections, 0][:4]
    return keys


def _delta_net(config: ModelConfig) -> dict[str, Any]:
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    interval = full[0] + 1 if full else len(config.layer_types) + 1
    expected = ["full_attention" if (n + 1) % interval == 0 else "linear_attention"
                for n in range(config.num_hidden_layers)]  # fmt: skip
    if list(config.layer_types) != expected:
        raise ConfigError(
            "The attention layers of this hybrid do not come at one interval, which is all that a "
            "GGUF file can say."
        )
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise ConfigError(
            f"The key heads of this hybrid are {config.linear_key_head_dim} wide and its value "
            f"heads {config.linear_value_head_dim}; llama.cpp takes them to be equal."
        )
    return {
        "full_attention_interval": interval,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }
