"""The same QLoRA steps through unsloth, on random weights.

Built as its documentation says: `FastLanguageModel.from_pretrained` with `load_in_4bit`, then
`get_peft_model` with adapters of rank 16 on all linear layers, bf16 autocast, bitsandbytes'
AdamW8bit. "full" is its own gradient checkpointing ("unsloth"), "none" goes without. It reads files
only, so random weights are first written as a checkpoint in bitsandbytes' 4 bits.

unsloth replaces parts of transformers as it is imported, and must come before that: its steps run
in a process of their own.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu.peer_step import PeerStep, causal_loss, eight_bit_adamw, measured_with, random_ids
from bench.gpu.step import RANK, StepSpec
from bench.gpu.step_peers import hf_config, quantised
from engine.benchmark.timing import clear
from models.config.model_config import ModelConfig

PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "peft", "bitsandbytes")
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SHARED_MEMORY = Path("/dev/shm")


def load_arguments(folder: Path, spec: StepSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What `FastLanguageModel.from_pretrained` is given."""
    return {
        "model_name": str(folder),
        "max_seq_length": spec.length,
        "dtype": dtype,
        "load_in_4bit": True,
    }


def adapter_arguments(spec: StepSpec) -> dict[str, Any]:
    """What `FastLanguageModel.get_peft_model` is given beside the model."""
    return {
        "r": RANK,
        "target_modules": list(_TARGETS),
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0,
        "bias": "none",
        "use_gradient_checkpointing": "unsloth" if spec.policy == "full" else False,
        "random_state": 0,
    }


def write_checkpoint(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """A random model of `config` with NF4 projections, and a tokenizer that nobody asks."""
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    model = quantised(config, device, dtype)
    stored = hf_config(config)
    stored.architectures = [type(model).__name__]
    stored.dtype = dtype
    stored.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    tensors = {
        name: value.contiguous().cpu() for name, value in model.state_dict().items() if name != tied
    }
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    stored.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)


def build(
    spec: StepSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A model of `config` in unsloth's hands, with adapters, in training mode."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    from unsloth import FastLanguageModel

    fast = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        write_checkpoint(Path(folder), config, device, dtype)
        clear(device)
        model, _ = FastLanguageModel.from_pretrained(**load_arguments(Path(folder), spec, dtype))
    adapted = FastLanguageModel.get_peft_model(model, **adapter_arguments(spec))
    trained: nn.Module = FastLanguageModel.for_training(adapted) or adapted
    return trained


def prepare(
    spec: StepSpec, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PeerStep:
    """A step of unsloth."""
    model = build(spec, config, device, dtype)
    loss = causal_loss(model, random_ids(config, spec, device), dtype)
    return PeerStep(model, loss, eight_bit_adamw(model))


measure_step = measured_with(prepare, PACKAGES)
