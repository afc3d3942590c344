"""What a model costs by its layers, heads, channels and experts.

A model is a sum over its layers of a mixer, whose cost follows from the heads that are left, and a
feed-forward part, whose cost follows from its channels or experts; the rest (embedding, last norm,
head) stays. In parameters the parts are counted on the graph. In milliseconds they are this
machine's times for a pass of `TOKENS` tokens through the model's own ops, taken as `engine bench`
takes its own (`engine.benchmark.timing`), one part of each kind, with random weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from engine.benchmark.timing import measure
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from models.tensor_names import graph_tensors, skeleton

TOKENS = 256
_SECONDS = 0.1
_SAMPLED = 4
"""Widths at which times are measured; between them they follow a line."""


@dataclass(frozen=True)
class Counts:
    """What goes: layers by number, the rest by how many of each layer."""

    layers: tuple[int, ...] = ()
    heads: int = 0
    kv_heads: int = 0
    channels: int = 0
    experts: int = 0

    def left(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a layer that is left; the number of layers is as it was."""
        return replace(
            config,
            num_attention_heads=config.num_attention_heads - self.heads,
            num_key_value_heads=config.num_key_value_heads - self.kv_heads,
            intermediate_size=config.intermediate_size - self.channels,
            num_experts=config.num_experts - self.experts,
        )


@dataclass(frozen=True)
class Parts:
    """The cost of every layer's mixer and feed-forward part, and of what is in no layer."""

    mixers: tuple[float, ...]
    feed_forwards: tuple[float, ...]
    rest: float


class Costs:
    """Costs of models with other counts than `config` has, as `parts_of` tells them."""

    def __init__(self, config: ModelConfig, parts_of: Callable[[ModelConfig], Parts]) -> None:
        self._config = config
        self._parts = cache(lambda counts: parts_of(counts.left(config)))

    def of(self, counts: Counts) -> float:
        """The cost of the model that is left."""
        mixers = self._parts(Counts(heads=counts.heads, kv_heads=counts.kv_heads))
        below, above, share = self._widths(counts)
        low, high = (
            self._parts(Counts(channels=width, experts=counts.experts)) for width in (below, above)
        )
        total = mixers.rest
        for layer, mixer in enumerate(mixers.mixers):
            if layer not in counts.layers:
                first, second = low.feed_forwards[layer], high.feed_forwards[layer]
                total += mixer + first + share * (second - first)
        return total

    def _widths(self, counts: Counts) -> tuple[int, int, float]:
        """Two sampled numbers of channels around the one that goes, and how far it is between."""
        if counts.channels == 0:
            return 0, 0, 0.0
        step = max(1, self._config.intermediate_size // _SAMPLED)
        below = counts.channels // step * step
        above = min(below + step, self._config.intermediate_size - 1)
        return below, above, (counts.channels - below) / max(above - below, 1)


def parameters_of(config: ModelConfig) -> Parts:
    """Parameters of the graph."""
    sizes = {name: math.prod(shape) for name, shape in graph_tensors(config).items()}
    layers = range(config.num_hidden_layers)
    mixers, feed_forwards = [], []
    for layer in layers:
        own = {n: s for n, s in sizes.items() if n.startswith(f"model.layers.{layer}.")}
        mlp = sum(size for name, size in own.items() if ".mlp." in name)
        feed_forwards.append(float(mlp))
        mixers.append(float(sum(own.values()) - mlp))
    rest = sum(sizes.values()) - sum(mixers) - sum(feed_forwards)
    return Parts(tuple(mixers), tuple(feed_forwards), rest)


def milliseconds_on(device: torch.device, dtype: torch.dtype) -> Callable[[ModelConfig], Parts]:
    """Measures the parts of a model on a device, each kind of layer once."""
    known: dict[tuple[object, ...], float] = {}

    def once(key: tuple[object, ...], call: Callable[[], object]) -> float:
        if key not in known:
            known[key] = 1000.0 * measure(call, device, budget=_SECONDS).median
        return known[key]

    @torch.no_grad()
    def parts_of(config: ModelConfig) -> Parts:
        period = config.period
        model = _random(config.with_layers(period), device, dtype)
        batch = PackedBatch.of(torch.zeros(1, TOKENS, dtype=torch.long))
        context = model.context(batch.to(device, model.ids_device))
        x = torch.randn(TOKENS, config.hidden_size, device=device).to(dtype)
        mixers, feed_forwards = [], []
        for index, layer in enumerate(model.layers):
            kind = (config.layer_types[index], config.rope_layers[index])
            heads = (config.num_attention_heads, config.num_key_value_heads)
            first, second = layer.input_layernorm, layer.post_attention_layernorm

            def mix(layer=layer, norm=first) -> object:  # type: ignore[no-untyped-def]
                return layer.mixer.forward(x, norm, context)

            def feed(layer=layer, norm=second) -> object:  # type: ignore[no-untyped-def]
                return layer.mlp.forward(x, x.clone(), norm, context)

            mixers.append(once(("mixer", *kind, *heads), mix))
            width = (config.intermediate_size, config.num_experts, config.sparse_layers[index])
            feed_forwards.append(once(("feed", *width), feed))
        rest = once(("rest",), lambda: model.logits(x))
        repeats = -(-config.num_hidden_layers // period)
        count = config.num_hidden_layers
        return Parts(
            tuple((mixers * repeats)[:count]), tuple((feed_forwards * repeats)[:count]), rest
        )

    return parts_of


@torch.no_grad()
def milliseconds_of(model: Decoder) -> float:
    """This machine's time for a pass of `TOKENS` tokens through a whole model."""
    batch = PackedBatch.of(torch.zeros(1, TOKENS, dtype=torch.long))
    given = batch.to(model.device, model.ids_device)

    def run() -> Tensor:
        return model.logits(model.hidden_states(given))

    return 1000.0 * measure(run, model.device, budget=_SECONDS).median


def _random(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A graph with random dense weights."""
    model = skeleton(config)
    for name, shape in [(n, tuple(p.shape)) for n, p in model.named_parameters()]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        weight: Tensor = torch.randn(shape, device=device).mul_(0.02).to(dtype)
        if isinstance(module, Linear) and leaf == "weight":
            module.set_weight(weight)
        else:
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    return model
