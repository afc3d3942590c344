"""How much each part of a model can give up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from engine.config.choices import Prunable
from engine.errors import ConfigError
from engine.pruning.budgets.costs import Counts
from engine.pruning.structures.channels import MULTIPLE
from models.config.model_config import ModelConfig

_MEASURED = 3


def units_of(config: ModelConfig, part: Prunable) -> int:
    """What the options of a part are counted out of: the same number in every layer."""
    if part == "layers":
        return config.num_hidden_layers
    if part == "mlp":
        return config.intermediate_size
    if part == "experts":
        return config.num_experts
    if part == "kv-groups":
        return config.num_key_value_heads
    return config.num_attention_heads // config.num_key_value_heads


def options_of(config: ModelConfig, part: Prunable) -> list[int]:
    """Numbers of units that may go, from none on. Raises `ConfigError` where there is no other."""
    units = units_of(config, part)
    if part == "layers":
        options = list(range(units // 2 + 1))
    elif part == "mlp":
        dense = not any(config.sparse_layers)
        left = range(units // MULTIPLE * MULTIPLE, units // 4, -MULTIPLE) if dense else ()
        options = sorted({0, *(units - width for width in left)})
    elif part == "experts":
        sparse = any(config.sparse_layers)
        options = list(range(units - config.num_experts_per_tok + 1)) if sparse else [0]
    else:
        options = [n for n in range(units) if _loads(config, counts_of(config, part, n))]
    if len(options) == 1:
        why = _why_none(config, part)
        raise ConfigError(f"--what {part}: {why}. Leave {part} out of --what.")
    return options


def _why_none(config: ModelConfig, part: Prunable) -> str:
    """Why a part has nothing to give up."""
    if part == "experts" and not any(config.sparse_layers):
        return "this model has no mixture of experts"
    if part == "mlp" and any(config.sparse_layers):
        return "the feed-forward parts of this model are mixtures of experts"
    return "every layer of this model has to keep all of its own"


def counts_of(config: ModelConfig, part: Prunable, count: int, order: Sequence[int] = ()) -> Counts:
    """What goes where a part gives up so many; of layers the first of `order`."""
    if part == "layers":
        return Counts(layers=tuple(order[:count]))
    if part == "mlp":
        return Counts(channels=count)
    if part == "experts":
        return Counts(experts=count)
    if part == "kv-groups":
        size = config.num_attention_heads // config.num_key_value_heads
        return Counts(heads=count * size, kv_heads=count)
    return Counts(heads=count * config.num_key_value_heads)


def joined(parts: Sequence[Counts]) -> Counts:
    """All of them together; each names other things."""
    return Counts(
        layers=tuple(layer for one in parts for layer in one.layers),
        heads=sum(one.heads for one in parts),
        kv_heads=sum(one.kv_heads for one in parts),
        channels=sum(one.channels for one in parts),
        experts=sum(one.experts for one in parts),
    )


def measured_options(options: Sequence[int]) -> list[int]:
    """Those whose loss is measured: the most, and some between it and none."""
    last = len(options) - 1
    steps = sorted({max(1, round(last * n / _MEASURED)) for n in range(1, _MEASURED + 1)})
    return [options[step] for step in steps]


def interpolated(measured: Mapping[int, float], count: int) -> float:
    """The loss at a count, on a line between those that were measured; 0 where nothing goes."""
    known = {0: 0.0, **measured}
    if count in known:
        return known[count]
    counts = sorted(known)
    right = min(bisect_left(counts, count), len(counts) - 1)
    low, high = counts[right - 1], counts[right]
    return known[low] + (known[high] - known[low]) * (count - low) / (high - low)


def _loads(config: ModelConfig, counts: Counts) -> bool:
    """Whether transformers takes a model with these heads (`engine.pruning.apply`)."""
    left = config.num_attention_heads - counts.heads
    return config.model_type != "llama" or config.hidden_size % left == 0
