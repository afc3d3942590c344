"""A config that cannot be honoured is refused in one sentence that names the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.config.model_config import ModelConfig

BASE: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "fixtures/golden/llama/config.json").read_text()
)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama", "qwen3_5_moe", "smollm3"]),
        ({"model_type": ["llama"]}, ["['llama']", "supported are"]),
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
        ({"rope_parameters": None, "rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_parameters": []}, ["rope_parameters", "an object"]),
        ({"rope_parameters": {"rope_type": "yarn", "facter": 2.0}}, ["facter", "factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
        ({"rope_parameters": YARN | {"beta_fast": "32"}}, ["beta_fast", "'32'"]),
        ({"rope_parameters": YARN | {"attention_factor": -1}}, ["attention_factor", "-1"]),
        ({"rope_parameters": YARN | {"beta_slow": 33}}, ["beta_fast", "beta_slow", "33"]),
        ({"rope_parameters": YARN | {"truncate": "no"}}, ["truncate"]),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 2**40}}, ["at most"]),
        ({"rope_scaling": YARN}, ["rope_parameters", "rope_scaling", "contradict"]),
        ({"attention_bias": "no"}, ["attention_bias", "'no'"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers", "None"]),
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


SWITCHED = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
HEADS, KV_HEADS = "num_attention_heads_per_layer", "num_key_value_heads_per_layer"
UNEVEN = {HEADS: [4, 3], KV_HEADS: [2, 1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({HEADS: [4]}, [HEADS, "2 numbers"]),
        ({KV_HEADS: [2, 1, 1]}, [KV_HEADS, "2 numbers"]),
        ({HEADS: 4}, [HEADS, "2 numbers"]),
        ({HEADS: [4, 0]}, [HEADS, "0 for layer 1", "from 1"]),
        ({KV_HEADS: [2, 0]}, [KV_HEADS, "0 for layer 1"]),
        ({HEADS: [4, 5]}, [HEADS, "5 for layer 1"]),
        ({HEADS: [4, 2.0]}, [HEADS, "2.0"]),
        ({HEADS: [4, True]}, [HEADS, "True"]),
        ({KV_HEADS: [2, 2]}, [HEADS, "3 for layer 1", "divide"]),
        ({HEADS: [2, 2]}, ["num_attention_heads is 4", "is 2"]),
        ({HEADS: None}, [KV_HEADS, HEADS, "without"]),
        ({"head_dim": None}, [HEADS, "head_dim"]),
    ],
)
def test_heads_layer_by_layer_are_checked(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict(BASE | UNEVEN | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_heads_layer_by_layer_are_those_of_the_layer() -> None:
    config = ModelConfig.from_dict(BASE | {"num_key_value_heads": 3} | UNEVEN | {KV_HEADS: [2, 3]})
    assert [config.heads(layer) for layer in (0, 1)] == [4, 3]
    assert [config.kv_heads(layer) for layer in (0, 1)] == [2, 3]
    assert config.period == 2
    assert [config.with_layers(5).heads(layer) for layer in range(5)] == [4, 3, 4, 3, 4]
    plain = ModelConfig.from_dict(BASE)
    assert (plain.heads(1), plain.kv_heads(1), plain.period) == (4, 2, 1)


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


def test_a_window_that_is_not_given_is_the_familys() -> None:
    def without(family: str) -> dict[str, Any]:
        keys = ("sliding_window", "layer_types", "max_window_layers")
        return {k: v for k, v in golden(family).items() if k not in keys}

    config = ModelConfig.from_dict(without("mistral"))
    assert config.sliding_window == 4096 and config.window(0) == 4096
    assert ModelConfig.from_dict(without("mistral") | {"sliding_window": None}).window(0) is None
    switched = without("qwen2") | {"use_sliding_window": True, "num_hidden_layers": 30}
    assert [layer for layer in range(30) if ModelConfig.from_dict(switched).window(layer)] == [
        28,
        29,
    ]
    assert (
        ModelConfig.from_dict(without("smollm3") | {"use_sliding_window": True}).window(1) is None
    )


def test_both_spellings_of_the_rotation_may_stand_there_if_they_agree() -> None:
    old = {"type": "yarn", "factor": 4.0}
    both = BASE | {"rope_parameters": YARN | {"beta_fast": 16}, "rope_scaling": old}
    rope = ModelConfig.from_dict(both).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["beta_fast"]) == ("yarn", 4.0, 16)
    null = BASE | {"rope_parameters": None, "rope_scaling": {}, "rope_theta": 5}
    assert ModelConfig.from_dict(null).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5.0,
    }


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_missing_key_is_called_missing(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is missing"):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k != key})


def test_eos_may_be_one_id_or_several() -> None:
    assert ModelConfig.from_dict(BASE | {"eos_token_id": 7}).eos_token_id == (7,)
    assert ModelConfig.from_dict(BASE | {"eos_token_id": [7, 9]}).eos_token_id == (7, 9)
    assert ModelConfig.from_dict(BASE | {"eos_token_id": None}).eos_token_id == ()


def golden(family: str) -> dict[str, Any]:
    folder = Path(__file__).parents[2] / "fixtures" / "golden" / family
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "2"]),
        ("smollm3", {"no_rope_layers": [1, 3]}, ["no_rope_layers", "0 or 1"]),
        (
            "qwen3_moe",
            {"num_hidden_layers": 1024, "num_local_experts": 4096, "num_experts": 4096},
            ["num_hidden_layers is 1024", "num_experts 4096"],
        ),
        ("qwen3_moe", {"num_experts_per_tok": 7}, ["num_experts_per_tok", "7", "6"]),
        ("qwen3_moe", {"num_experts": 5}, ["num_experts", "num_local_experts", "5"]),
        ("qwen3_moe", {"num_local_experts": [6]}, ["num_experts", "[6]"]),
        (
            "qwen3_moe",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            ["layer_types", "8", "every layer"],
        ),
        ("qwen2", {**SWITCHED, "max_window_layers": "1"}, ["max_window_layers"]),
        ("qwen2", {"use_sliding_window": "yes"}, ["use_sliding_window"]),
        ("qwen2_moe", {"mlp_only_layers": 0}, ["mlp_only_layers"]),
        ("qwen3_moe", {"moe_intermediate_size": 0}, ["moe_intermediate_size"]),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size"]),
        ("qwen2_moe", {"mlp_only_layers": [2]}, ["mlp_only_layers", "0 to 1"]),
        ("qwen2_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        ("qwen2_moe", {"router_aux_loss_coef": -1.0}, ["router_aux_loss_coef"]),
        ("qwen2_moe", {"norm_topk_prob": 1}, ["norm_topk_prob"]),
        ("qwen2_moe", {"layer_types": ["linear_attention"] * 2}, ["linear_attention"]),
        ("qwen3_next", {"linear_num_key_heads": 4}, ["linear_num_value_heads", "4"]),
        ("qwen3_next", {"rope_parameters": {"partial_rotary_factor": 0.2}}, ["partial_rotary"]),
        ("qwen3_5", {"attn_output_gate": False}, ["attn_output_gate"]),
        ("qwen3_5", {"output_gate_type": "sigmoid"}, ["output_gate_type", "sigmoid"]),
        ("qwen3_5_vl", {"text_config": None}, ["text_config"]),
        ("qwen3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ],
)
def test_bad_value_of_another_family_is_refused_by_name(
    family: str, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict(golden(family) | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_tied_head_is_what_the_outer_part_of_the_file_says() -> None:
    raw = golden("qwen3_5_vl")
    assert not ModelConfig.from_dict(raw).tie_word_embeddings
    assert ModelConfig.from_dict(raw | {"tie_word_embeddings": True}).tie_word_embeddings


def test_smollm3_leaves_every_fourth_layer_unrotated() -> None:
    raw = {k: v for k, v in golden("smollm3").items() if not k.startswith(("no_rope", "layer_"))}
    assert ModelConfig.from_dict(raw | {"num_hidden_layers": 5}).rope_layers == (
        True, True, True, False, True,
    )  # fmt: skip


def test_smollm3_may_list_more_layers_than_it_has() -> None:
    raw = golden("smollm3") | {"no_rope_layers": [1, 0, 1, 1, 0]}
    assert ModelConfig.from_dict(raw).rope_layers == (True, False)


def test_a_hybrid_has_every_fourth_layer_attend() -> None:
    raw = {k: v for k, v in golden("qwen3_next").items() if k not in ("layer_types",)}
    config = ModelConfig.from_dict(raw | {"num_hidden_layers": 8})
    assert config.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    assert config.period == 4
    assert config.with_layers(6).layer_types == config.layer_types[:6]


def test_experts_may_be_spelled_either_way() -> None:
    raw = golden("qwen3_moe")
    count = raw.pop("num_local_experts")
    assert ModelConfig.from_dict(raw | {"num_experts": count}) == ModelConfig.from_dict(
        raw | {"num_local_experts": count}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": YARN | {"a\nb": 1}},
        {"layer_types": ["a\nb\x1b[2J"] * BASE["num_hidden_layers"]},
        {"model_type": "a\nb"},
        {"hidden_act": "a\nb"},
        {"alibi_a\nb": {"on": True}, "rope_parameters": {"rope_type": "a\nb"}},
    ],
)
def test_a_name_with_a_line_break_does_not_part_the_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"supported|known|expected") as error:
        ModelConfig.from_dict(BASE | change)
    assert str(error.value).isprintable()
