"""The same QLoRA steps through torchtune, on random weights.

Built as its recipe `lora_finetune_single_device` does with the configuration
`llama3_1/8B_qlora_single_device`: `lora_llama3_1` with torchao's NF4 weights, weights and
activations in bf16, cross-entropy over 8 chunks of the outputs, torch's fused AdamW. Adapters have
rank 16 and are on all linear layers, as on the other sides. "full" recomputes every layer, "none"
nothing; nothing is compiled, as the configuration has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.peer_step import PeerStep, measured_with, random_ids
from bench.gpu.step import RANK, StepSpec
from models.config.model_config import ModelConfig

PACKAGES = ("torchtune", "torchao")


def model_arguments(config: ModelConfig, length: int) -> dict[str, Any]:
    """What `lora_llama3_1` is given. Raises `ValueError` for what is no Llama."""
    if config.model_type != "llama":
        raise ValueError(f"torchtune is measured with Llama's shape, not with {config.model_type}")
    return {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "embed_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "max_seq_len": length,
        "norm_eps": config.rms_norm_eps,
        "rope_base": int(config.rope_parameters["rope_theta"]),
        "lora_rank": RANK,
        "lora_alpha": 2 * RANK,
        "quantize_base": True,
    }


def build(
    spec: StepSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A model with random NF4 projections and adapters, in training mode, and its loss of ids."""
    from torchtune import modules, training
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    with training.set_default_dtype(dtype), device:
        model: Any = lora_llama3_1(**model_arguments(config, spec.length))
    with torch.no_grad():
        model.tok_embeddings.weight.normal_(std=0.02)
    set_trainable_params(model, get_adapter_params(model))
    if spec.policy == "full":
        layers = {modules.TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=layers)
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)

    def loss(ids: Tensor) -> Tensor:
        nothing = ids.new_full((ids.shape[0], 1), loss_fn.ignore_index)
        value: Tensor = loss_fn(model(tokens=ids), torch.hstack((ids[:, 1:], nothing)))
        return value

    return model.train(), loss


def prepare(
    spec: StepSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PeerStep:
    """A step of torchtune."""
    model, loss = build(spec, config, device, dtype)
    ids = random_ids(config, spec, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return PeerStep(model, lambda: loss(ids), optimizer)


measure_step = measured_with(prepare, PACKAGES)
