"""Logits, loss and gradients of random models of many shapes against transformers.

The goldens have one shape a family. Here are other numbers of heads, widths of heads, biases,
rotary scalings, windows, orders of layers and routers, in the spellings of both versions of
config.json. What transformers makes of a file is the truth about that file.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine.model_sources.load_model import load_model

pytestmark = pytest.mark.interop

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 20}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 28}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "every head its own keys": ("llama", {"num_key_value_heads": 6}),
    "keys for all": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_theta": 5e5}
        | {"rope_scaling": LLAMA3},
    ),
    "old linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "new linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
    ),
    "dynamic, not yet stretched": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 3.0}}),
    "dynamic, stretched": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 40},
    ),
    "yarn with every number": (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 0.9}},
    ),
    "yarn of two scales": (
        "llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
    ),
    "outer original length": (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    ),
    "biases that mistral knows not": (
        "mistral",
        {"attention_bias": True, "mlp_bias": True, "sliding_window": None},
    ),
    "biases that qwen3 knows not": ("qwen3", {"mlp_bias": True, "head_dim": 16}),
    "wide heads of mistral": ("mistral", {"head_dim": 20, "sliding_window": 9}),
    "window from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "window that is switched off": ("qwen2", {"sliding_window": 7, "max_window_layers": 0}),
    "window by name": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "head_dim": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "heads of 128": ("qwen3", {"attention_bias": True, "rope_scaling": YARN}),
    "unrotated layers": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1], "attention_bias": False, "mlp_bias": True}
        | {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 6},
    ),
    "every second layer sparse": (
        "qwen2_moe",
        SHARED | {"decoder_sparse_step": 2, "norm_topk_prob": True, "num_hidden_layers": 4},
    ),
    "windows of a mixture": (
        "qwen2_moe",
        SHARED
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        | {"qkv_bias": False, "mlp_only_layers": [1]},
    ),
    "one expert a token": ("qwen3_moe", EXPERTS | {"num_experts_per_tok": 1}),
    "one expert": ("qwen3_moe", ONE_EXPERT),
    "one expert beside the shared one": (
        "qwen2_moe",
        ONE_EXPERT | {"shared_expert_intermediate_size": 28, "norm_topk_prob": True},
    ),
    "one expert of a hybrid": (
        "qwen3_next",
        ONE_EXPERT | {"shared_expert_intermediate_size": 28} | DELTA | LAYERS,
    ),
    "one expert of a decoder with vision": (
        "qwen3_5_moe_text",
        ONE_EXPERT | {"shared_expert_intermediate_size": 28} | DELTA | LAYERS,
    ),
    "all experts for every token": (
        "qwen3_moe",
        EXPERTS | {"num_experts_per_tok": 5, "norm_topk_prob": True},
    ),
    "experts of width one": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 1}),
    "one of everything": (
        "qwen3_moe",
        ONE_EXPERT
        | {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"head_dim": 4, "moe_intermediate_size": 1},
    ),
    "one layer, one head": (
        "llama",
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"head_dim": 4, "intermediate_size": 1},
    ),
    "one head of a hybrid": (
        "qwen3_next",
        SHARED
        | LAYERS
        | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 1}
        | {"linear_num_value_heads": 1, "partial_rotary_factor": 0.5},
    ),
    "window on every layer": (
        "qwen3_moe",
        EXPERTS
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        | {"head_dim": 16, "tie_word_embeddings": True, "norm_topk_prob": True},
    ),
    "hybrid in old spelling": (
        "qwen3_next",
        SHARED
        | DELTA
        | {"full_attention_interval": 2, "partial_rotary_factor": 0.5, "rope_theta": 1e7}
        | {"norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "hybrid that begins with attention": (
        "qwen3_next",
        SHARED | DELTA | {"layer_types": LAYERS["layer_types"][::-1], "attention_bias": True},
    ),
    "hybrid with yarn": (
        "qwen3_5_text",
        DELTA
        | LAYERS
        | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}
        | {"rope_parameters": YARN | {"rope_theta": 1e7, "partial_rotary_factor": 0.5}},
    ),
    "hybrid mixture": ("qwen3_5_moe_text", SHARED | DELTA | LAYERS),
    "decoder of a larger model": (
        "qwen3_5",
        DELTA
        | LAYERS
        | {"attn_output_gate": True, "mtp_num_hidden_layers": 1, "tie_word_embeddings": True}
        | {"partial_rotary_factor": 0.25}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            }
        },
    ),
}


def config_of(model_type: str, change: dict[str, Any]) -> dict[str, Any]:
    """What stands in config.json."""
    raw = COMMON | change
    if "no_rope_layers" in change:
        raw["num_hidden_layers"] = len(change["no_rope_layers"])
    if model_type != "qwen3_5":
        return {"model_type": model_type, **raw}
    return {
        "model_type": model_type,
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_5_text", **raw},
        "vision_config": VISION | {"model_type": "qwen3_5_vision"},
        "tie_word_embeddings": raw["tie_word_embeddings"],
    }


@torch.no_grad()
def written(raw: dict[str, Any], folder: Path) -> Any:
    """A transformers model of `raw`, saved beside `raw` itself."""
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(folder)
    named = raw.get("architectures")
    kind = getattr(transformers, named[0])._from_config if named else None
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = (kind or AutoModelForCausalLM.from_config)(config, **how)
    centred = raw["model_type"].startswith(("qwen3_next", "qwen3_5"))
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            values = torch.rand(parameter.shape, generator=generator)
        elif "norm" in name:
            values = 0.3 * values + (0.0 if centred and "linear_attn" not in name else 1.0)
        elif parameter.ndim > 1:
            values /= math.sqrt(parameter.shape[-1])
        else:
            values *= 0.3
        parameter.copy_(values)
    model.tie_weights()
    model.float().eval().save_pretrained(folder)
    path.write_text(json.dumps(raw))
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.replace("model.language_model.", "model."): parameter.grad
        for name, parameter in model.named_parameters()
        if ".visual." not in name
    }


@pytest.mark.parametrize("name", CASES)
def test_a_random_model_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, change = CASES[name]
    other = written(config_of(model_type, change), tmp_path / "model")
    model = load_model(tmp_path / "model").requires_grad_(True)
    ids = torch.randint(3, 64, (2, 70), generator=torch.Generator().manual_seed(5))
    labels = torch.where(torch.rand(2, 70) < 0.3, -100, ids)
    theirs = other(input_ids=ids, labels=labels, use_cache=False)
    theirs.loss.backward()
    loss = model.loss(ids, labels)
    loss.backward()
    tolerance = 2e-4 if "linear_attention" in model.config.layer_types else 1e-5
    with torch.no_grad():
        assert float((model(ids) - theirs.logits).abs().max()) <= tolerance
    assert float((loss - theirs.loss).abs()) <= 1e-6
    wanted, slopes = gradients(other), gradients(model)
    assert set(wanted) == set(slopes)
    for path, gradient in wanted.items():
        # A bias of keys that are not rotated moves all scores alike, and has no gradient.
        error = float((slopes[path] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()) + 1e-7, path
    bounds = torch.tensor([0, 33, 70], dtype=torch.int32)
    with torch.no_grad():
        alone = [other(input_ids=part[None]).logits[0] for part in (ids[0, :33], ids[0, 33:])]
        packed = model(ids[:1], bounds)[0]
    assert float((packed - torch.cat(alone)).abs().max()) <= tolerance
