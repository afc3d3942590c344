"""The same QLoRA steps through transformers, PEFT and bitsandbytes, on random weights.

Built as their documentation says: bitsandbytes' Linear4bit with double quantisation in every
projection, `prepare_model_for_kbit_training`, LoRA of rank 16 on all linear layers, bf16 autocast,
SDPA attention, bitsandbytes' AdamW8bit. "full" recomputes every layer
(`gradient_checkpointing_enable`), "none" nothing; there is no level between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.step import RANK, StepSpec, model_flops, summary
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.timing import clear, synchronize
from engine.provenance import installed
from models.config.model_config import ModelConfig

PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")


def missing(packages: Sequence[str] = PACKAGES) -> list[str]:
    """The packages that are not installed."""
    return [name for name in packages if find_spec(name) is None]


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


def measure_step(
    spec: StepSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    small: bool = False,
    steps: int = 3,
    peak_flops: float | None = None,
) -> dict[str, Any]:
    """The figures of `bench.gpu.step.measure_step` for the other side."""
    clear(device)
    config = configuration(spec.model, small)
    model = build(config, spec.policy, device, dtype)
    ids = random_ids(config, spec, device)
    timed = timed_steps(model, causal_loss(model, ids, dtype), eight_bit_adamw(model), steps)
    return row(spec, config, timed, peak_flops, device, PACKAGES)


def random_ids(config: ModelConfig, spec: StepSpec, device: torch.device) -> Tensor:
    """Random tokens (documents, length)."""
    return torch.randint(0, config.vocab_size, (spec.documents, spec.length), device=device)


def eight_bit_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over what is trained."""
    import bitsandbytes

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
    return optimizer


def causal_loss(model: Any, ids: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The loss of transformers' model with every token trained, under autocast in 16 bits."""

    def loss() -> Tensor:
        half = dtype != torch.float32
        with torch.autocast(ids.device.type, dtype) if half else nullcontext():
            value: Tensor = model(input_ids=ids, labels=ids).loss
        return value

    return loss


@dataclass(frozen=True)
class TimedSteps:
    """Seconds of the steps after the warm-up, and every step's loss."""

    seconds: list[float]
    losses: list[float]


def timed_steps(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> TimedSteps:
    """Whole steps, clipped to a norm of 1, as the engine's own are timed: two to warm up."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, warmup = trained[0].device, 2
    times, losses = [], []
    for step in range(warmup + steps):
        if step == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        synchronize(device)
        times.append(time.perf_counter() - started)
    return TimedSteps(times[warmup:], losses)


def row(
    spec: StepSpec,
    config: ModelConfig,
    timed: TimedSteps,
    peak_flops: float | None,
    device: torch.device,
    packages: Sequence[str],
) -> dict[str, Any]:
    """The figures of `bench.gpu.step.measure_step`, with the other side's versions."""
    flops = model_flops(config, spec)
    return {
        **asdict(spec),
        **summary(timed.seconds, spec.tokens, flops, peak_flops, device),
        "losses": timed.losses,
        "versions": {name: installed(name) for name in packages},
    }
