"""Logits of a model, with one layer in memory at a time.

A model of one layer is built again and again: its source is that layer of the whole, its embedding
the states that the layer before left. So a model of any depth takes the memory of a layer in fp32,
and the head is multiplied some rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import row_parts, rows_of_part
from engine.model_sources.interface.view import ModelSourceView
from engine.model_sources.load_model import build_model
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.adapters import attach_lora
from models.config.model_config import ModelConfig
from models.layers.linear import RMSNorm
from models.layers.packed_batch import PackedBatch
from models.tensor_layout import Layout

HEAD = "lm_head.weight"
T = TypeVar("T")


@torch.no_grad()
def layerwise_logits(
    source: ModelSource,
    ids: Tensor,
    pairs: Mapping[str, tuple[Tensor, ...]] | None = None,
    scales: Mapping[str, float] | None = None,
) -> Tensor:
    """Logits (T, V) in fp32, on the CPU, of ids (T,) of one document.

    `pairs` with their `scales` (`models.adapters.attach_lora`) stay beside the weights.
    """
    config = source.config
    embedding = Layout(config.nested).path("model.embed_tokens.weight")
    states = embedded(source, embedding, ids).float()
    batch = PackedBatch.of(torch.arange(len(ids))[None])
    for index in range(config.num_hidden_layers):
        layer = OneLayer(source, index, states)
        model = build_model(layer)
        own = {layer.inner(m): pair for m, pair in (pairs or {}).items() if layer.holds(m)}
        factors = {layer.inner(m): scale for m, scale in (scales or {}).items() if layer.holds(m)}
        attach_lora(model, own, factors)
        states = model.hidden_states(batch)
        del model  # Before the next is built: two layers would be in memory.
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norm)
    norm.weight.data = source.tensor(Layout(config.nested).path("model.norm.weight")).float()
    return _logits(source, embedding if config.tie_word_embeddings else HEAD, norm(states))


def embedded(source: ModelSource, embedding: str, ids: Tensor) -> Tensor:
    """The rows of tensor `embedding` for ids (...), as (..., H)."""
    flat = ids.reshape(-1)
    states, start = torch.empty(0), 0
    for part in row_parts(source, embedding):
        if start == 0:
            states = part.new_empty(len(flat), part.shape[1])
        inside = (flat >= start) & (flat < start + len(part))
        states[inside] = part[flat[inside] - start]
        start += len(part)
    return states.view(*ids.shape, -1)


def _logits(source: ModelSource, head: str, states: Tensor) -> Tensor:
    """In memory of one size: parts that come and go beside results leave holes in the heap."""
    rows, width = source.shape(head)
    logits = states.new_empty(rows, len(states))
    wide, start = states.new_empty(rows_of_part((rows, width)), width), 0
    for part in row_parts(source, head):
        own = wide[: len(part)].copy_(part)
        torch.mm(own, states.T, out=logits[start : start + len(part)])
        start += len(part)
        del part
    return logits.T


class OneLayer(ModelSourceView):
    """Layer `index` of `base` as a model, whose embedding are `states` (T, H)."""

    def __init__(self, base: ModelSource, index: int, states: Tensor) -> None:
        super().__init__(base)
        layout = Layout(base.config.nested)
        self._here, self._there = (
            layout.path(f"model.layers.{index}."), layout.path("model.layers.0."),
        )  # fmt: skip
        self._norm = layout.path("model.norm.weight")
        self._embedding, self._states = layout.path("model.embed_tokens.weight"), states
        self.config = _one_layer(base.config, index, len(states))

    def holds(self, module: str) -> bool:
        """Whether `module` of the whole model is in this layer."""
        return module.startswith(self._here)

    def inner(self, module: str) -> str:
        """The name that `module` of the whole model has here."""
        return self._there + module.removeprefix(self._here)

    def names(self) -> list[str]:
        own = [self.inner(name) for name in self.base.names() if self.holds(name)]
        return [self._embedding, *own, self._norm]

    def tensor(self, name: str) -> Tensor:
        return self._states if name == self._embedding else self.base.tensor(self._outer(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        return None if name == self._embedding else self.base.codes(self._outer(name))

    def release(self, name: str) -> None:
        if name != self._embedding:
            self.base.release(self._outer(name))

    def _outer(self, name: str) -> str:
        if not name.startswith(self._there):
            return name
        return self._here + name.removeprefix(self._there)


def _one_layer(config: ModelConfig, index: int, vocabulary: int) -> ModelConfig:
    """`config` with layer `index` alone."""

    def one(values: tuple[T, ...]) -> tuple[T, ...]:
        return values[index : index + 1]

    return replace(
        config,
        num_hidden_layers=1,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        layer_types=one(config.layer_types),
        rope_layers=one(config.rope_layers),
        sparse_layers=one(config.sparse_layers),
        num_attention_heads_per_layer=one(config.num_attention_heads_per_layer),
        num_key_value_heads_per_layer=one(config.num_key_value_heads_per_layer),
    )
