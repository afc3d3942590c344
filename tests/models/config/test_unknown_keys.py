"""Keys that no family reads are ignored with a warning, unless they ask for other arithmetic."""

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config.model_config import ModelConfig
from models.config.unknown_keys import FEATURES, NEUTRAL

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
KEYS = st.from_regex(r"[a-z]{3,9}(_[a-z]{3,9}){0,2}", fullmatch=True)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@pytest.mark.parametrize(
    "inert",
    [
        {"use_mrope": False},
        {"qkv_bias": True},
        {"use_qk_norm": False},
        {"shared_expert_intermediate_size": 0},
        {"max_sequence_length": 2048, "unk_token_id": 0, "num_labels": 2},
        {"neftune_noise_alpha": 5, "attn_logit_softcapping": None, "residual_multiplier": 1.0},
        {"position_embedding_type": "rope", "scoring_func": "softmax", "alibi": False},
        {"use_rms_norm": True, "bias": "none", "use_bias": False, "layer_norm_type": "rms"},
        {"dual_chunk_attention_config": {"chunk_size": 262144}},
    ],
)
def test_keys_that_ask_for_nothing_change_nothing(inert: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(QWEN2 | inert) == ModelConfig.from_dict(QWEN2)


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=8))
def test_keys_of_no_program_change_nothing(inert: dict[str, Any]) -> None:
    known = {*NEUTRAL, *FEATURES, *ModelConfig.__dataclass_fields__}
    inert = {f"tool_{key}": value for key, value in inert.items() if key not in known}
    assert ModelConfig.from_dict(QWEN2 | inert) == ModelConfig.from_dict(QWEN2)


def test_an_ignored_key_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        ModelConfig.from_dict(QWEN2 | {"mystery": 1, "tool_note": "x"})
    (record,) = caplog.records
    assert "qwen2" in record.getMessage() and "mystery, tool_note" in record.getMessage()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8),
        ("use_mrope", True),
        ("alibi", True),
        ("use_qk_norm", True),
        ("parallel_attn", True),
        ("clip_qkv", 8.0),
        ("norm_type", "layernorm"),
        ("layer_norm_type", "low_precision"),
        ("use_rms_norm", False),
        ("lm_head_bias", True),
        ("use_bias", True),
        ("num_meta_tokens", 128),
        ("laurel_rank", 64),
        ("num_experts", 8),
        ("scoring_func", "sigmoid"),
        ("mrope_section", [16, 24, 24]),
        ("head_gate", 1),
        ("query_multiplier", 0.5),
    ],
)
def test_a_key_that_asks_for_other_arithmetic_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_dict(QWEN2 | {key: value})


def test_a_feature_of_the_family_may_be_named() -> None:
    qwen3 = QWEN2 | {"model_type": "qwen3"}
    assert ModelConfig.from_dict(qwen3 | {"use_qk_norm": True}) == ModelConfig.from_dict(qwen3)
