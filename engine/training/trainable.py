"""Make a model trainable: adapter or all weights, and the optimizer."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.config.rules import Facts, check
from engine.config.train_config import TrainConfig
from engine.device import resolve_dtype
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.peft import AdapterConfig, Pairs, load_adapter
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_for
from engine.model_sources.open import open_model_source
from engine.storage.safe_files import read_json_object
from models.adapters import add_lora, load_adapter_tensors, scale_of, target_modules
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.families import FAMILIES
from models.layers.context import StepSettings, layer_policies
from models.memory.cuda_graphs import recordable
from models.tensor_names import MLP_PROJECTIONS, projections_of
from optim import AdamW8bit, StepInBackward, param_groups

log = logging.getLogger(__name__)

BASE_FILE = "base.json"
"""Beside an adapter: the digest of the base that it was trained on."""


def check_init_adapter(config: TrainConfig, model: ModelConfig, digest: str) -> Pairs | None:
    """The tensors of `init_adapter`, if there is one and it is of this base, rank and targets.

    Raises `CheckpointError` naming every mismatch.
    """
    if config.init_adapter is None:
        return None
    adapter, tensors = load_adapter(config.init_adapter)
    wrong = []
    base = _base_digest(config.init_adapter)
    if base is not None and base != digest:
        wrong.append(f"it was trained on another base ({adapter.base_model_name_or_path})")
    elif base is None and not _same_model(adapter.base_model_name_or_path, config.model):
        wrong.append(f"its base is {adapter.base_model_name_or_path}, this run's {config.model}")
    if adapter.r != config.lora_rank:
        wrong.append(f"its rank is {adapter.r}, --lora-rank is {config.lora_rank}")
    # An adapter of experts has the root of rsLoRA in its alpha, so the scales are compared.
    scale = scale_of(config.lora_rank, config.lora_alpha, config.use_rslora)
    if not math.isclose(adapter.scale, scale):
        wrong.append(
            f"its alpha is {adapter.lora_alpha:g} (rslora {adapter.use_rslora}), this run's "
            f"{config.lora_alpha:g} (rslora {config.use_rslora})"
        )
    if adapter.use_dora != config.use_dora:
        wrong.append(f"its use_dora is {adapter.use_dora}, this run's {config.use_dora}")
    targets = {path.rsplit(".", 1)[-1] for path in tensors}
    wanted = set(targets_of(config, model))
    if targets != wanted:
        wrong.append(f"it adapts {_listed(targets)}, --target-modules is {_listed(wanted)}")
    if wrong:
        raise CheckpointError(
            f"The adapter {config.init_adapter} cannot be trained on from here: "
            f"{'; '.join(wrong)}. Give the settings it was trained with, or leave out "
            "--init-adapter to start a new one."
        )
    return tensors


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _base_digest(adapter: Path) -> str | None:
    path = adapter / BASE_FILE
    if not path.is_file():
        return None
    try:
        return str(read_json_object(path)["digest"])
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it to go on by the base's name alone."
        ) from error


def _same_model(left: str, right: str) -> bool:
    """Whether two names of a model mean the same: equal paths, or the same last part."""
    if not left:
        return True
    return Path(left).resolve() == Path(right).resolve() or Path(left).name == Path(right).name


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


def make_trainable(model: Decoder, config: TrainConfig, init: Pairs | None) -> int:
    """Turn on what `config.method` trains and return the number of trainable parameters."""
    if config.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
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
        if init is not None:
            load_adapter_tensors(model, init)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_settings(config: TrainConfig) -> StepSettings:
    """How every step is computed. `config.gradient_checkpointing` must be a policy, not auto."""
    return StepSettings(
        checkpointing=config.gradient_checkpointing,
        offload_inputs="checkpoints" in config.offload,
        mlp_tile_tokens=config.mlp_tile_tokens,
        low_memory_decode=config.low_memory_decode,
        loss_chunk_tokens=config.loss_chunk_tokens,
    )


def load_teacher(config: TrainConfig, student: ModelConfig, device: torch.device) -> Decoder | None:
    """The model of `config.teacher`, loaded as the run's own base is; None where there is none.

    Raises `CheckpointError` where its vocabulary is another.
    """
    if config.teacher is None:
        return None
    source = open_model_source(config.teacher)
    theirs, ours = source.config.vocab_size, student.vocab_size
    if theirs != ours:
        raise CheckpointError(
            f"The teacher {config.teacher} has a vocabulary of {theirs}, the model one of {ours}; "
            "probabilities can only be compared over the same tokens."
        )
    log.info("learning from %s", config.teacher)
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


def check_run(
    config: TrainConfig, model: ModelConfig | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises `ConfigError` where the settings do not fit the model, if known, or the machine."""
    facts = Facts(device=device.type, dtype=str(dtype).removeprefix("torch."))
    if model is not None:
        facts = replace(
            facts,
            model_type=model.model_type,
            tied=model.tie_word_embeddings,
            recordable=_recordable(model) if config.cuda_graphs else None,
        )
    check(config, facts)


def _recordable(model: ModelConfig) -> bool:
    """Whether CUDA graphs can hold any layer of the model."""
    with torch.device("meta"):
        return any(map(recordable, Decoder(model).layers))


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


def adapter_config(config: TrainConfig, source: ModelSource) -> AdapterConfig:
    """What `adapter_config.json` says of this run's adapter."""
    local = Path(config.model).exists()
    return AdapterConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(targets_of(config, source.config)),
        base_model_name_or_path=str(source.path.resolve()) if local else config.model,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fused_experts=FAMILIES[source.config.model_type].fused_adapters,
    )


def check_policies(config: TrainConfig, layers: int) -> None:
    """Raises `ConfigError` where the checkpointing policies are not those of this many layers."""
    try:
        layer_policies(config.gradient_checkpointing, layers)
    except ValueError as error:
        raise ConfigError(f"--gradient-checkpointing: {error}.") from error
