"""Prune channels or layers as settings ask for it."""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.export import parse_dtype
from engine.model_sources.gguf.source import type_to_write
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.pruning_record import HeadMap, head_map, read_pruning
from engine.pruning.calibration import calibration_examples
from engine.pruning.reconstruction.from_settings import calibration_of, say_memory, whole_model
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.repair import RepairedSource
from engine.pruning.structures.channels import ChannelPruning, channels_to_go
from engine.pruning.structures.depth import (
    GapRepair,
    layers_by_cosine,
    layers_by_loss,
    may_go,
)
from engine.pruning.structures.experts import (
    FewerExpertsSource,
    experts_to_go,
    routed_mass,
)
from engine.pruning.structures.views import NarrowSource, ShallowSource


def prune_structures(
    source: ModelSource,
    settings: PruneSettings,
    protected: frozenset[int],
    rows: list[Example] | None = None,
) -> tuple[ModelSource, dict[str, Any]]:
    """The model without what is least important, and what its record says.

    `rows` are those of calibration, where they were read already. Raises `ConfigError` for a
    fraction that cannot be met.
    """
    examples = calibration_examples(source, calibration_of(settings)) if rows is None else rows
    if rows is None:
        say_memory(source, examples, settings)
    if settings.what == "mlp":
        left, record = _without_channels(source, settings, examples, protected)
    elif settings.what == "experts":
        left, record = _without_experts(source, settings, examples, protected)
    else:
        left, record = _without_layers(source, settings, examples, protected)
    sizes = [elements(model) for model in (source, left)]
    record |= {
        "mode": settings.form,
        "what": settings.what,
        "metric": settings.importance,
        "fraction": settings.share,
        "protected": sorted(protected),
        "parameters": {"before": sizes[0], "after": sizes[1]},
        "tokens": sum(map(len, examples)),
        "seed": settings.seed,
    }
    return left, record


def _without_channels(
    source: ModelSource,
    settings: PruneSettings,
    examples: list[Example],
    protected: frozenset[int],
) -> tuple[ModelSource, dict[str, Any]]:
    _refuse_protection(protected, "--what mlp takes as many channels out of every layer")
    count = channels_to_go(source.config, settings.share)
    ridge = settings.repair_ridge if settings.repairs else None
    stream = LayerStream(source, examples, calibration_of(settings))
    work = ChannelPruning(stream, settings.importance, ridge, _written(source, settings))
    work.run(count, settings.seed)
    width = source.config.intermediate_size
    units = {"before": width, "asked": round(settings.share * width), "removed": count}
    left = NarrowSource(RepairedSource(source, work.changes), work.staying)
    pruned = _earlier(source)
    return left, {"units": units, "parts": work.told, "pruned_heads": head_map(pruned)}


def _without_experts(
    source: ModelSource,
    settings: PruneSettings,
    examples: list[Example],
    protected: frozenset[int],
) -> tuple[ModelSource, dict[str, Any]]:
    _refuse_protection(protected, "--what experts takes as many out of every mixture")
    config = source.config
    count = experts_to_go(config, settings.share)
    mass = routed_mass(LayerStream(source, examples, calibration_of(settings)))
    generator = torch.Generator().manual_seed(settings.seed)
    staying, parts = {}, []
    for layer, shares in mass.items():
        chance = torch.rand(len(shares), generator=generator)
        order = (chance if settings.importance == "random" else shares).argsort(stable=True)
        pruned = order[:count].sort().values
        staying[layer] = order[count:].sort().values
        parts.append(
            {
                "layer": layer,
                "experts": len(shares),
                "pruned": pruned.tolist(),
                "error_removed": float(shares[pruned].sum()),
            }
        )
    units = {"before": config.num_experts, "asked": count, "removed": count}
    pruned_heads = head_map(_earlier(source))
    left = FewerExpertsSource(source, staying)
    return left, {"units": units, "parts": parts, "pruned_heads": pruned_heads}


def _without_layers(
    source: ModelSource,
    settings: PruneSettings,
    examples: list[Example],
    protected: frozenset[int],
) -> tuple[ModelSource, dict[str, Any]]:
    layers = source.config.num_hidden_layers
    count = math.floor(settings.share * layers + 0.5)
    free = [layer for layer in range(layers) if layer not in protected]
    needed = _needed(source)
    most = min(len(free) - bool(needed and needed <= set(free)), layers - 1)
    if not 0 < count <= most:
        attention = ", with attention where the model has both kinds" if needed else ""
        raise ConfigError(
            f"--fraction {settings.share:g} of {layers} layers is {count}, and {len(free)} are "
            f"not protected. Ask for at least one, and leave at least one{attention}."
        )
    how = calibration_of(settings)
    if settings.importance == "l2-reconstruction":
        divergence = whole_model(source, examples, how)
        order = layers_by_loss(divergence, layers, count, protected, needed)
        del divergence
    else:
        if settings.importance == "cosine":
            costs = layers_by_cosine(LayerStream(source, examples, how), layers)
        else:
            generator = torch.Generator().manual_seed(settings.seed)
            costs = torch.rand(layers, generator=generator, dtype=torch.float64).tolist()
        left, order = set(range(layers)), []
        for layer in sorted(free, key=costs.__getitem__):
            if len(order) < count and may_go(layer, left, needed):
                left.remove(layer)
                order.append((layer, costs[layer]))
    pruned = sorted(layer for layer, _ in order)
    staying = [layer for layer in range(layers) if layer not in pruned]
    ShallowSource(source, staying)  # refuses what no configuration says, before the repair
    repair = GapRepair(
        LayerStream(source, examples, how), settings.repair_ridge, _written(source, settings)
    )
    if settings.repairs:
        repair.run(layers, pruned)
    shallow = ShallowSource(RepairedSource(source, repair.changes), staying)
    earlier = _earlier(source)
    return shallow, {
        "units": {"before": layers, "asked": count, "removed": count},
        "order": [{"layer": layer, "score": score} for layer, score in order],
        "pruned_layers": pruned,
        "parts": repair.told,
        "pruned_heads": head_map(
            {new: earlier[old] for new, old in enumerate(staying) if old in earlier}
        ),
    }


def _needed(source: ModelSource) -> frozenset[int]:
    """Layers of which one stays: transformers runs no model of linear attention alone."""
    kinds = source.config.layer_types
    attention = {layer for layer, kind in enumerate(kinds) if kind != "linear_attention"}
    return frozenset(attention) if len(attention) < len(kinds) else frozenset()


def _refuse_protection(protected: frozenset[int], why: str) -> None:
    if protected:
        raise ConfigError(f"{why}, so no layer can be protected. Leave out --protect.")


def _written(source: ModelSource, settings: PruneSettings) -> torch.dtype | None:
    return parse_dtype(settings.dtype or type_to_write(source))


def _earlier(source: ModelSource) -> HeadMap:
    """Heads that were pruned before and are in the weights as zeros."""
    pruning = read_pruning(source.path)
    return {} if pruning is None else pruning.heads


def elements(source: ModelSource) -> int:
    """Of all tensors together."""
    return sum(math.prod(source.shape(name)) for name in source.names())
