"""A config that cannot be honoured is refused in one sentence that names the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.config import ModelConfig

BASE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures/golden/llama/config.json").read_text()
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"vocab_size": 2**40}, ["vocab_size"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"head_dim": 15}, ["head_dim", "even"]),
        ({"head_dim": None, "hidden_size": 66}, ["hidden_size", "66"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_theta": -1.0}}, ["rope_theta"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"layer_types": ["full_attention", "ring"]}, ["ring"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
        ({"mystery_gate": True, "other_gate": 1}, ["mystery_gate", "other_gate"]),
    ],
)
def test_bad_value_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict(BASE | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_qwen3_head_dim_defaults_to_128() -> None:
    raw = {k: v for k, v in BASE.items() if k != "head_dim"} | {"model_type": "qwen3"}
    assert ModelConfig.from_dict(raw).head_dim == 128


def test_qwen2_always_has_query_biases_and_never_an_output_bias() -> None:
    config = ModelConfig.from_dict(BASE | {"model_type": "qwen2"})
    assert config.attention_bias and not config.attention_output_bias


def test_sliding_window_needs_its_switch_in_qwen2_and_not_in_mistral() -> None:
    window = {"sliding_window": 16}
    assert ModelConfig.from_dict(BASE | window | {"model_type": "qwen2"}).window(0) is None
    assert ModelConfig.from_dict(BASE | window | {"model_type": "mistral"}).window(0) == 16


def test_eos_may_be_one_id_or_several() -> None:
    assert ModelConfig.from_dict(BASE | {"eos_token_id": 7}).eos_token_id == (7,)
    assert ModelConfig.from_dict(BASE | {"eos_token_id": [7, 9]}).eos_token_id == (7, 9)
    assert ModelConfig.from_dict(BASE | {"eos_token_id": None}).eos_token_id == ()
