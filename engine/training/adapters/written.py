"""What adapter_config.json says of the adapter that a run trains."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config.train_config import TrainConfig
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.fit import module_shapes
from engine.model_sources.adapter.starting_point import InitAdapter, shortest_names
from engine.model_sources.adapter.targets import is_meant
from engine.model_sources.interface.model_source import ModelSource
from engine.training.adapters.selection import (
    Selection,
    is_plain,
    layers_of,
    leaves_of,
    selection,
)
from models.config.model_config import ModelConfig
from models.families import FAMILIES


@dataclass(frozen=True)
class WrittenTargets:
    """Names or endings of modules, and the layers that they are meant in; none for all."""

    names: list[str]
    layers: tuple[int, ...] = ()


def adapter_config(
    config: TrainConfig, source: ModelSource, init: InitAdapter | None
) -> AdapterConfig:
    """What `adapter_config.json` says of this run's adapter."""
    model, local = source.config, Path(config.model).exists()
    selected = selection(config, model) if init is None else {}
    targets, patterns = _targets(config, model, selected, init), _patterns(config, selected)
    return AdapterConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets.names,
        base_model_name_or_path=str(source.path.resolve()) if local else config.model,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fused_experts=FAMILIES[model.model_type].fused_adapters,
        rank_pattern=patterns.rank_pattern,
        alpha_pattern=patterns.alpha_pattern,
        layers=targets.layers,
        loftq_iter=config.loftq_iter if config.init_lora_weights == "loftq" else 0,
    )


def _targets(
    config: TrainConfig, model: ModelConfig, selected: Selection, init: InitAdapter | None
) -> WrittenTargets:
    if init is not None:
        return WrittenTargets(init.target_modules())
    if is_plain(config):
        return WrittenTargets(list(leaves_of(selected)))
    stored = {projection.stored for projection in selected}
    every = module_shapes(model).keys()
    layers = tuple(layers_of(config.layers, model.num_hidden_layers))
    endings = list(leaves_of(selected))
    if layers and _meant(every, endings, layers) == stored:
        return WrittenTargets(endings, layers)
    return WrittenTargets(shortest_names(stored, every))


def _meant(every: Collection[str], endings: list[str], layers: tuple[int, ...]) -> set[str]:
    """The modules that PEFT adapts by these keys."""
    raw = {"target_modules": endings, "layers_to_transform": list(layers)}
    return {module for module in every if is_meant(raw, module, "adapter_config.json")}


def _patterns(config: TrainConfig, selected: Selection) -> AdapterConfig:
    """Ranks and alphas as they were given, where they say of the file's names what is trained.

    Else one for every module that differs from the rest, by its whole name.
    """
    rank, alpha = config.lora_rank, config.lora_alpha
    given = AdapterConfig(
        rank, alpha, [], rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern
    )
    sizes = {projection.stored: size for projection, size in selected.items()}
    if all(
        (given.rank(name), given.alpha(name)) == (size.rank, size.alpha)
        for name, size in sizes.items()
    ):
        return given
    return replace(
        given,
        rank_pattern={re.escape(n): s.rank for n, s in sizes.items() if s.rank != rank},
        alpha_pattern={re.escape(n): s.alpha for n, s in sizes.items() if s.alpha != alpha},
    )
