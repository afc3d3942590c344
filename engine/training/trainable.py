"""Make a model trainable: adapter or all weights, and the optimizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.config.spelling import given_chunk
from engine.config.train_config import TrainConfig
from engine.device import resolve_dtype
from engine.errors import ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_for
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.fates import run_fate, say
from models.adapters import add_lora, attach_lora, target_modules
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.families import FAMILIES
from models.layers.context import StepSettings
from models.memory.lasting import keep_decoded
from models.tensor_names import MLP_PROJECTIONS, projections_of
from optim import AdamW8bit, ScheduleShape, StepInBackward, param_groups

log = logging.getLogger(__name__)


def targets_of(config: TrainConfig, model: ModelConfig) -> tuple[str, ...]:
    """The projections to adapt; a preset means those of its names that the model has."""
    try:
        names = target_modules(config.target_modules)
    except ValueError as error:
        raise ConfigError(f"--target-modules: {error}.") from error
    there = projections_of(model)
    missing = [name for name in names if name not in there]
    if missing and not isinstance(config.target_modules, str):
        raise ConfigError(
            f"--target-modules: a {model.model_type} model has no {', '.join(missing)}; it has "
            f"{', '.join(there)}."
        )
    if config.use_dora and any(model.sparse_layers) and set(names) & set(MLP_PROJECTIONS):
        raise ConfigError(
            f"use_dora is not defined for the experts of a {model.model_type} model: they are "
            "parameters of many matrices, for which PEFT refuses DoRA, so that no program could "
            "load the adapter. Adapt the attention alone with --target-modules attn, or leave "
            "--use-dora out."
        )
    return tuple(name for name in names if name in there)


def make_trainable(model: Decoder, config: TrainConfig, init: InitAdapter | None) -> int:
    """Turn on what `config.method` trains and return the number of trainable parameters.

    A new adapter is as the settings say; an earlier one is as its tensors are. With the adapter in
    place, the last layers' weights are decoded to stay, as `config.keep_decoded` says.
    """
    if config.every_weight:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    elif init is not None:
        attach_lora(model, init.pairs, init.scales(), config.lora_dropout)
    else:
        add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=targets_of(config, model.config),
            use_rslora=config.use_rslora,
            seed=config.seed,
            use_dora=config.use_dora,
        )
    layers = model.layers
    keep_decoded(layers[len(layers) - decoded_layers(config, len(layers)) :], model.dtype)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def decoded_layers(config: TrainConfig, layers: int) -> int:
    """How many layers keep their weights decoded; auto, where nobody resolved it, is none."""
    return min(int(config.keep_decoded), layers) if config.keep_decoded.isdecimal() else 0


def step_settings(config: TrainConfig) -> StepSettings:
    """How every step is computed. `config.gradient_checkpointing` must be a policy, not auto."""
    return StepSettings(
        checkpointing=config.gradient_checkpointing,
        offload_inputs="checkpoints" in config.offload,
        mlp_tile_tokens=config.mlp_tile_tokens,
        low_memory_decode=config.low_memory_decode,
        loss_chunk_tokens=given_chunk(config.loss_chunk_tokens),
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
    )


def load_teacher(config: TrainConfig, device: torch.device) -> Decoder | None:
    """The model of `config.teacher`, loaded as the run's own base is; None where there is none."""
    if config.teacher is None:
        return None
    source = open_model_source(config.teacher)
    log.info("learning from %s", config.teacher)
    say(source, run_fate(config, source))
    return build_for(config, source, device, resolve_dtype(config.dtype, device))


def make_optimizer(model: Decoder, config: TrainConfig) -> AdamW8bit:
    """AdamW over the trainable parameters; norms and biases do not decay."""
    return AdamW8bit(
        param_groups(model.named_parameters(), config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        min_8bit_size=4096 if config.optimizer == "adamw8bit" else 1 << 62,
    )


def lr_shape(config: TrainConfig, total_steps: int) -> ScheduleShape:
    """The shape of the schedule of a run of `total_steps`."""
    return ScheduleShape(
        config.lr_power,
        config.lr_num_cycles,
        config.decay_steps(total_steps),
        config.lr_decay_shape,
    )


def make_in_backward(
    model: Decoder, optimizer: AdamW8bit, config: TrainConfig
) -> StepInBackward | None:
    """What steps the optimizer in backward, a layer at a time, where `config` asks for it."""
    if not config.optimizer_in_backward:
        return None
    layers = [layer.trainable() for layer in model.layers]
    inside = {id(parameter) for unit in layers for parameter in unit}
    rest = [[p] for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return StepInBackward(optimizer, [*(unit for unit in layers if unit), *rest])


def adapter_config(
    config: TrainConfig, source: ModelSource, init: InitAdapter | None
) -> AdapterConfig:
    """What `adapter_config.json` says of this run's adapter."""
    targets = list(targets_of(config, source.config)) if init is None else init.target_modules()
    local = Path(config.model).exists()
    return AdapterConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        base_model_name_or_path=str(source.path.resolve()) if local else config.model,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fused_experts=FAMILIES[source.config.model_type].fused_adapters,
    )
