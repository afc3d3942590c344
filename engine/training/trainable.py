"""Make a model trainable: adapter or all weights, and the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from engine.config.spelling import given_chunk
from engine.config.train_config import TrainConfig
from engine.device import resolve_dtype
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.load_model import build_for
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.fates import run_fate, say
from engine.training.adapters.selection import leaves_of, selection
from kernels.loss.cross_entropy import LossTerms
from models.adapters import add_pairs, attach_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.memory.lasting import keep_decoded
from models.memory.sharded_parameters import ShardedParameters
from models.sharding import trained_pieces
from models.weight_average import WeightAverage
from optim import (
    Adafactor,
    AdamW8bit,
    Lion8bit,
    Muon,
    ScheduleShape,
    StepInBackward,
    StepOptimizer,
    param_groups,
)
from optim.muon import is_hidden_matrix
from optim.param_groups import DividedParameter, piece_groups, plus_ratio

log = logging.getLogger(__name__)

LEAST_8BIT = 4096
"""Elements from which on a parameter's states take 8 bits, in optimizers that have such states."""


def targets_of(config: TrainConfig, model: ModelConfig) -> tuple[str, ...]:
    """The last parts of the names of the projections to adapt."""
    return leaves_of(selection(config, model))


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
        add_pairs(
            model,
            {p.path: size for p, size in selection(config, model.config).items()},
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            seed=config.seed,
            use_dora=config.use_dora,
        )
    for parameter in whole_parameters(model, config).values():
        parameter.requires_grad_(True)
    layers = model.layers
    keep_decoded(layers[len(layers) - decoded_layers(config, len(layers)) :], model.dtype)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def whole_parameters(model: Decoder, config: TrainConfig) -> dict[str, nn.Parameter]:
    """What is trained whole beside an adapter, by the graph's names; a tied head is the embedding.

    They have the compute type, as the weights of method full.
    """
    asked = set(config.saved_modules)
    if not asked:
        return {}
    tied = model.lm_head is None
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    if tied:
        asked = {"embed_tokens"}
    return {names[module]: model.get_parameter(names[module]) for module in sorted(asked)}


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
        neftune_alpha=config.neftune_noise_alpha,
        loss_terms=LossTerms(config.label_smoothing_factor, config.z_loss),
    )


def load_teacher(config: TrainConfig, device: torch.device) -> Decoder | None:
    """The model of `config.teacher`, loaded as the run's own base is; None where there is none."""
    if config.teacher is None:
        return None
    source = open_model_source(config.teacher)
    log.info("learning from %s", config.teacher)
    say(source, run_fate(config, source))
    return build_for(config, source, device, resolve_dtype(config.dtype, device))


def make_optimizer(model: Decoder, config: TrainConfig) -> StepOptimizer:
    """The optimizer of `config` over the trainable parameters; norms and biases do not decay."""
    return optimizer_over(model.named_parameters(), config)


def optimizer_over(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> StepOptimizer:
    """The optimizer of `config` over those of these parameters that are trainable."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    decay, lr = config.weight_decay, config.learning_rate
    if config.optimizer == "muon":
        groups = [
            {**group, "muon": muon}
            for muon in (True, False)
            if (members := [(n, p) for n, p in trained if is_hidden_matrix(n, p) is muon])
            for group in param_groups(members, decay)
        ]
        return Muon(groups, lr, decay, betas=config.betas, eps=config.eps)
    groups = param_groups(trained, decay, lr_ratio(config))
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr, decay)
    return optimizer_of(groups, config)


def piece_optimizer(pieces: Sequence[DividedParameter], config: TrainConfig) -> StepOptimizer:
    """The optimizer of `config` over a process's pieces of the trained parameters.

    Where it works on matrices the pieces are whole ones. Raises `ValueError` without any.
    """
    if works_on_matrices(config):
        return optimizer_over([(piece.name, piece.parameter) for piece in pieces], config)
    decay, least = config.weight_decay, least_8bit(config)
    return optimizer_of(piece_groups(pieces, decay, least, lr_ratio(config)), config)


def works_on_matrices(config: TrainConfig) -> bool:
    """Whether an update of an element follows from others of its matrix."""
    return config.optimizer in ("muon", "adafactor")


def optimizer_of(groups: list[dict[str, Any]], config: TrainConfig) -> StepOptimizer:
    """The optimizer of `config` over groups of parameters, or of parts of them: AdamW or Lion."""
    lr, least = config.learning_rate, least_8bit(config)
    if config.optimizer == "lion8bit":
        return Lion8bit(groups, lr, config.betas, config.weight_decay, min_8bit_size=least)
    return AdamW8bit(groups, lr, config.betas, config.eps, min_8bit_size=least)


def least_8bit(config: TrainConfig) -> int:
    """Elements from which on the states of a parameter take 8 bits."""
    return 1 << 62 if config.optimizer == "adamw" else LEAST_8BIT


def make_average(model: Decoder, config: TrainConfig) -> WeightAverage | None:
    """The moving average of what this process trains, where `config` asks for one."""
    if config.ema_decay is None:
        return None
    if isinstance(model.weight_stream, ShardedParameters):
        pieces = [(piece.name, piece.parameter) for piece in trained_pieces(model)]
        return WeightAverage(pieces, config.ema_decay)
    return WeightAverage(model.named_parameters(), config.ema_decay)


def lr_ratio(config: TrainConfig) -> Callable[[str, torch.Tensor], float] | None:
    """How much faster than the others a parameter learns; None where all learn alike."""
    ratio = config.loraplus_lr_ratio
    if ratio is None:
        return None
    return lambda name, parameter: plus_ratio(name, parameter, ratio)


def lr_shape(config: TrainConfig, total_steps: int) -> ScheduleShape:
    """The shape of the schedule of a run of `total_steps`."""
    return ScheduleShape(
        config.lr_power,
        config.lr_num_cycles,
        config.decay_steps(total_steps),
        config.lr_decay_shape,
    )


def backward_units(model: Decoder) -> list[list[torch.Tensor]]:
    """The trained parameters in the order in which backward reaches them, a list for each part.

    A head that is the embedding too comes last, with what else is reached at the end.
    """
    tail: list[nn.Module] = [model.model.norm]
    if model.lm_head is not None:
        tail.append(model.lm_head)
    top: list[torch.Tensor] = [p for m in tail for p in m.parameters() if p.requires_grad]
    layers = [layer.trainable() for layer in reversed(model.layers)]
    reached = {id(p) for unit in (top, *layers) for p in unit}
    rest: list[torch.Tensor] = [
        p for p in model.parameters() if p.requires_grad and id(p) not in reached
    ]
    return [unit for unit in (top, *layers, rest) if unit]


def make_in_backward(
    model: Decoder, optimizer: StepOptimizer, config: TrainConfig
) -> StepInBackward | None:
    """What steps the optimizer in backward, a layer at a time, where `config` asks for it."""
    if not config.optimizer_in_backward:
        return None
    layers = [layer.trainable() for layer in model.layers]
    inside = {id(parameter) for unit in layers for parameter in unit}
    rest = [[p] for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return StepInBackward(optimizer, [*(unit for unit in layers if unit), *rest])
