"""The same QLoRA steps through transformers, PEFT and bitsandbytes, on random weights.

Built as their documentation says: bitsandbytes' Linear4bit with double quantisation in every
projection, `prepare_model_for_kbit_training`, LoRA of rank 16 on all linear layers, bf16 autocast,
SDPA attention, bitsandbytes' AdamW8bit. "full" recomputes every layer
(`gradient_checkpointing_enable`), "none" nothing; there is no level between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.gpu.peer_step import PeerStep, causal_loss, eight_bit_adamw, measured_with, random_ids
from bench.gpu.step import RANK, StepSpec
from models.config.model_config import ModelConfig

PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")


def hf_config(config: ModelConfig) -> Any:
    """transformers' configuration of the same shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=dict(config.rope_parameters),
        use_cache=False,
    )


def quantised(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of `config` with random NF4 projections, without adapters."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config(config), dtype=dtype, attn_implementation="sdpa"
        )
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _linear4bit(module, device, dtype))
    _materialise(model, device, dtype)
    model.tie_weights()
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def build(config: ModelConfig, policy: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of `config` with random NF4 projections and LoRA pairs, in training mode."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = quantised(config, device, dtype)
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=policy == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def _linear4bit(module: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, quantised by bitsandbytes where they will be used."""
    import bitsandbytes

    weight = torch.randn(module.out_features, module.in_features, device=device, dtype=dtype)
    weight *= module.in_features**-0.5
    made: nn.Module = bitsandbytes.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(device)
    return made


def _materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give what is still on the meta device random values; rotary tables are computed anew."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                shape, matrix = parameter.shape, parameter.dim() > 1
                value = torch.empty(shape, device=device, dtype=dtype)
                value = value.normal_(std=0.02) if matrix else value.fill_(1.0)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            fresh: Any = type(module)
            for name, buffer in fresh(module.config).named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)


def prepare(
    spec: StepSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PeerStep:
    """A step of these libraries."""
    model = build(config, spec.policy, device, dtype)
    loss = causal_loss(model, random_ids(config, spec, device), dtype)
    return PeerStep(model, loss, eight_bit_adamw(model))


measure_step = measured_with(prepare, PACKAGES)
