"""Several adapters as one: the weighted sum of their effects.

    W + sum_i w_i s_i B_i A_i  =  W + B A,   A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2 ...]

which is exact whatever the ranks, and what PEFT's `add_weighted_adapter` computes with
combination_type "cat". (Its "linear" adds up the factors A and B, whose product has terms of pairs
of adapters that nobody trained.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.contents import OtherTensors, Pairs
from engine.model_sources.adapter.fit import ModuleNames, check_fit
from engine.model_sources.adapter.gguf_lora import in_order
from engine.model_sources.adapter.peft import Adapter
from models.config.model_config import ModelConfig

Weighted = tuple[Adapter, float]


def weighted_sum(parts: Sequence[Weighted], model: ModelConfig, name: str) -> Adapter:
    """The adapter that does what `parts` do together to `model`, which messages call `name`.

    One adapter of weight 1 is itself. Raises `ConfigError` for an adapter whose effect is no
    multiple of one, and `CheckpointError` where one does not fit the model.
    """
    if not parts:
        raise ConfigError("There is no adapter to add up.")
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    for adapter, weight in parts:
        check_fit(adapter, model, name)
        _require_linear(adapter, weight, len(parts))
    named = [(_in_model(adapter, model), weight) for adapter, weight in parts]
    first = parts[0][0]
    others = _others(named)
    pairs = _joined([(adapter.pairs, adapter.scales, weight) for adapter, weight in named])
    holder = [a for a, _ in parts if a.others.copies or a.others.rows or a.others.bases]
    raw: dict[str, Any] = dict(holder[0].config.raw) if holder else {}
    rank = max((int(a.shape[0]) for a, *_ in (pairs | others.embeddings).values()), default=1)
    config = AdapterConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({module.rpartition(".")[2] for module in pairs}),
        base_model_name_or_path=first.config.base_model_name_or_path,
        raw=raw | {"use_dora": False, "init_lora_weights": True},
    )
    also = tuple(adapter.path for adapter, _ in parts[1:])
    return Adapter(first.path, config, pairs, dict.fromkeys(pairs, 1.0), others, also=also)


def _require_linear(adapter: Adapter, weight: float, count: int) -> None:
    """Raises `ConfigError` where `weight` times what the adapter does is not to be had."""
    config, others = adapter.config, adapter.others
    why = ""
    if config.use_dora:
        why = (
            "is a DoRA adapter: it sets the lengths of the weight's rows, so that neither a part "
            "of it nor a sum with another adapter is defined"
        )
    elif config.initial:
        why = (
            f"changes the base weights by its initialisation ({config.initial}); merge it alone, "
            "and the others into what is written"
        )
    elif weight != 1.0 and (others.copies or others.rows or others.bases):
        why = (
            "holds whole tensors in place of the model's (modules_to_save, trained biases or "
            f"tokens), of which there is no part {weight:g}; give it the weight 1"
        )
    if why:
        one = "Merge it alone, without a weight." if config.use_dora else ""
        what = f"{count} adapters with weights" if count > 1 else f"a weight of {weight:g}"
        raise ConfigError(f"{what} cannot be merged: {adapter.path} {why}. {one}".rstrip())


def _in_model(adapter: Adapter, model: ModelConfig) -> Adapter:
    """`adapter` under the model's names of modules and with its order of rows."""
    adapter = in_order(adapter, model)
    names, others = ModuleNames(model, adapter), adapter.others
    scales = adapter.scales | {
        module: adapter.config.module_scale(module) for module in others.embeddings
    }
    return replace(
        adapter,
        pairs=names.all(adapter.pairs),
        scales=names.all(scales),
        others=OtherTensors(
            names.all(others.biases),
            names.all(others.embeddings),
            names.all(others.bases),
            names.all(others.copies),
            names.all(others.rows),
        ),
    )


def _joined(parts: Sequence[tuple[Pairs, dict[str, float], float]]) -> Pairs:
    """Pairs of scale 1 whose products are the weighted sums."""
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for pairs, scales, weight in parts:
        for module, (a, b, *_) in pairs.items():
            halves.setdefault(module, []).append((a, b * (scales[module] * weight)))
    return {
        module: (torch.cat([a for a, _ in both]), torch.cat([b for _, b in both], dim=1))
        for module, both in halves.items()
    }


def _others(named: Sequence[Weighted]) -> OtherTensors:
    """What the adapters hold beside pairs. Raises `ConfigError` where two replace one tensor."""
    result = OtherTensors()
    result.embeddings = _joined(
        [(adapter.others.embeddings, adapter.scales, weight) for adapter, weight in named]
    )
    whole: dict[str, Adapter] = {}
    for adapter, weight in named:
        for module, bias in adapter.others.biases.items():
            extra = bias * (adapter.scales[module] * weight)
            result.biases[module] = result.biases.get(module, torch.zeros_like(bias)) + extra
        own = {**adapter.others.copies, **adapter.others.bases, **adapter.others.rows}
        holder = next(iter(whole.values()), None)
        if holder is not None and own:
            raise ConfigError(
                f"{holder.path} and {adapter.path} both hold whole tensors in place of "
                "the model's (modules_to_save, trained biases or tokens), which cannot be added "
                "up. Merge one of them alone."
            )
        whole |= dict.fromkeys(own, adapter)
        result.copies |= adapter.others.copies
        result.bases |= adapter.others.bases
        result.rows |= adapter.others.rows
    return result
