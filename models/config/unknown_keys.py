"""Keys of config.json that no supported family reads.

A file of the real world carries keys of its tools, of other versions and of other families. Most
change nothing: they are ignored, with one warning. Those below change the arithmetic of some
family, and are refused unless their value asks for what this graph does anyway: a model that is
read without them would be silently wrong. Sources: the configurations of Gemma, Granite, MiniCPM,
Cohere, OLMo, Phi, DeepSeek, Llama 4, gpt-oss and others in transformers 5.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from models.families.json_values import listed

log = logging.getLogger(__name__)

_OFF = (None, False, 0, "none", "")
_ONE = (*_OFF, 1)
_SILU = ("silu", "swish", "swiglu", "swish_glu", None)


def _keys(names: str, neutral: Iterable[Any]) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), tuple(neutral))


NEUTRAL: dict[str, tuple[Any, ...]] = {
    # soft caps, clipping and temperatures
    **_keys(
        "attn_logit_softcapping final_logit_softcapping attn_soft_cap logits_soft_cap "
        "logit_softcap attention_logit_cap query_pre_attn_scalar clip_qkv qkv_clip swiglu_limit "
        "swiglu_alpha swiglu_clamp attn_temperature_tuning floor_scale softmax_scale attn_scale",
        _OFF,
    ),
    # multipliers of embedding, residual stream, attention and logits
    **_keys(
        "embedding_multiplier embedding_scale residual_multiplier residual_scale logits_scaling "
        "logit_scale logits_scale scale_emb lm_head_multiplier key_multiplier mup_width_scale "
        "rotary_pct rope_pct moe_layer_freq routed_scaling_factor",
        _ONE,
    ),
    **_keys("attention_multiplier scale_depth dim_model_base mup_base_width scale_embedding", _OFF),
    # other positions and rotations
    **_keys(
        "alibi use_alibi alibi_bias_max rope_interleave rope_interleaved use_mrope mrope_section "
        "rotary_dim no_rope_layer_interval attention_chunk_size position_interpolation "
        "logn_attn use_logn_attn use_dynamic_ntk",
        _OFF,
    ),
    **_keys("position_embedding_type pos_emb_type", (None, "rope", "rotary", "absolute")),
    # parallel blocks, norms of other kinds, other activations
    **_keys(
        "parallel_attn use_parallel_residual parallel_residual parallel_blocks sandwich_norm "
        "post_norm use_post_norm use_layernorm layernorm_sequential_residual attention_sinks "
        "attn_sink attention_sink use_attention_sink num_sink_tokens num_meta_tokens "
        "num_memory_tokens layer_scale num_kv_shared_layers hc_mult altup_num_inputs laurel_rank "
        "hidden_size_per_layer_input normalize_embedding embedding_layernorm use_mup mup "
        "multi_query scale_attn_by_inverse_layer_idx",
        _OFF,
    ),
    # biases that no supported family has
    **_keys("use_bias add_bias_linear bias lm_head_bias head_bias embedding_bias", _OFF),
    **_keys("use_rms_norm use_rmsnorm rms_norm", (None, True)),
    **_keys(
        "norm_type normalization_type layer_norm_type",
        (None, "rms", "rmsnorm", "rms_norm", "RMSNorm"),
    ),
    **_keys("hidden_activation activation_function mlp_activation ffn_act_fn", _SILU),
    # routing and attention of other families
    **_keys(
        "n_group topk_group n_routed_experts n_shared_experts first_k_dense_replace "
        "q_lora_rank kv_lora_rank index_topk router_jitter_noise input_jitter_noise "
        "expert_bias use_expert_bias moe_router_enable_expert_bias num_experts_per_token "
        "num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
        "shared_expert_intermediate_size interleave_moe_layer_step sparse_attention "
        "linear_attn_config",
        _OFF,
    ),
    **_keys("scoring_func score_function router_score_function", (None, "softmax")),
}
"""Key -> the values that ask for nothing. `no_rope_layers` and the like are judged by the graph."""

_FEATURES = {
    "qk_norm": "use_qk_norm qk_norm qk_layernorm use_qk_layernorm add_qk_norm",
    "attention_bias": "qkv_bias use_qkv_bias add_qkv_bias attn_qkv_bias",
    "attention_output_bias": "o_bias attention_out_bias attn_output_bias add_out_bias",
    "mlp_bias": "use_mlp_bias ffn_bias",
    "attention_gate": "attn_output_gate use_attention_gate gated_attention attention_output_gate",
    "zero_centered_norm": "layernorm_zero_centered zero_centered_gamma zero_centered_rmsnorm",
}
FEATURES = {key: feature for feature, keys in _FEATURES.items() for key in keys.split()}
"""Key -> the field of `ModelConfig` that says whether this graph has what the key switches on."""

# What is named like this changes the arithmetic in every family that has it.
_TELLING = {re.compile(r".*(_gate|_softcap|_softcapping|_alibi)$"): _OFF,
            re.compile(r".*_multiplier$"): _ONE}  # fmt: skip


def neutral_values(key: str, fields: Any) -> tuple[Any, ...] | None:
    """The values of `key` that ask for nothing this graph lacks; None where all do."""
    if key in FEATURES:
        return None if getattr(fields, FEATURES[key]) else _OFF
    if key in NEUTRAL:
        return NEUTRAL[key]
    return next((values for name, values in _TELLING.items() if name.match(key)), None)


def judge_unknown_keys(raw: Mapping[str, Any], unknown: Iterable[str], fields: Any) -> None:
    """Warn of unknown keys that change nothing.

    `fields` is the configuration that was read (`ModelConfig`). Raises `ValueError` that names the
    keys whose values ask for arithmetic that this graph does not do.
    """
    refused: list[str] = []
    ignored: list[str] = []
    for key in sorted(unknown):
        neutral, value = neutral_values(key, fields), raw[key]
        if neutral is None:
            ignored += [] if key in FEATURES else [key]
        elif value if isinstance(value, list | dict) else value not in neutral:
            refused.append(f"{listed([key])} = {value!r}")
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: this asks for arithmetic that a {fields.model_type} model does "
            "not have here; the model would be computed wrongly without it. Remove the key only if "
            "it changes nothing about the model"
        )
    if ignored:
        _warn_once(fields.model_type, tuple(ignored))


@cache
def _warn_once(model_type: str, keys: tuple[str, ...]) -> None:
    log.warning(
        "Keys of config.json that a %s model does not read are ignored: %s",
        model_type,
        listed(keys),
    )
