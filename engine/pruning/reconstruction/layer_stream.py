"""Calibration rows on their way through a model, layer by layer.

Each layer is built as a model of its own whose embedding are the states that the layers before it
left (`engine.inference.layerwise`), so that the states of all tokens and one layer are all the
memory there is, whatever the model's depth. A layer may be changed before its output is taken:
the layers after it then see the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.device import resolve_device, resolve_dtype
from engine.inference.layerwise import OneLayer, embedded
from engine.inference.perplexity import by_tokens
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_model
from engine.pruning.calibration import TOKENS_PER_BATCH, Calibration, heads_output
from engine.pruning.reconstruction.least_squares import InputMoments
from kernels.linear.lora import project
from models.decoder import Decoder
from models.head_slices import HeadSlices, layer_heads
from models.layers.context import LayerContext
from models.layers.linear import Linear
from models.layers.observer import LayerObserver, observe_layers
from models.layers.packed_batch import PackedBatch
from models.tensor_layout import Layout


class LayerStream:
    """All tokens of `examples` at the entrance of one layer: `states` (N, H), of layer 0 at first.

    `open` builds a layer, `run` gives what it makes of the states, and `go_on` steps to the next.
    """

    def __init__(self, source: ModelSource, examples: Sequence[Example], how: Calibration) -> None:
        self.source, self.how = source, how
        self.device = resolve_device(how.device)
        self.dtype = resolve_dtype(how.dtype, self.device)
        whole = [collate(group) for group in by_tokens(examples, TOKENS_PER_BATCH)]
        ids = torch.cat([batch.input_ids for batch in whole])
        self._batches = _numbered(whole)
        embedding = Layout(source.config.nested).path("model.embed_tokens.weight")
        self.states = embedded(source, embedding, ids).to(self.device, self.dtype)

    def open(self, index: int) -> Decoder:
        """Layer `index` alone, which reads the states as they are now."""
        return build_model(
            OneLayer(self.source, index, self.states),
            quantization=self.how.quantize,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def run(self, model: Decoder, observer: LayerObserver | None = None) -> Tensor:
        """What a layer makes of the states (N, H), while an observer is told of it."""
        with observe_layers(observer or LayerObserver()):
            outputs = [
                model.hidden_states(batch.to(model.device, model.ids_device))
                for batch in self._batches
            ]
        return torch.cat(outputs)

    @torch.no_grad()
    def mixed(self, model: Decoder) -> list[Tensor]:
        """The mixer's half of a layer: what its output projection reads (n, heads x D), by batch.

        With `finished` it is what `run` does: a layer that changes in between mixes tokens once.
        """
        layer = model.layers[0]
        mixer, norm = layer.mixer, layer.input_layernorm
        return [
            heads_output(mixer, mixer.forward(x, norm, context)[1]).flatten(1)
            for x, context in self._inputs(model)
        ]

    @torch.no_grad()
    def finished(
        self, model: Decoder, read: Sequence[Tensor], observer: LayerObserver | None = None
    ) -> Tensor:
        """The other half: the output (N, H) of a layer whose projection reads this."""
        layer, outputs = model.layers[0], []
        for z, (x, context) in zip(read, self._inputs(model), strict=True):
            (addend,), _ = project(z, layer.mixer.output())
            y, saved = layer.mlp.forward(x, addend, layer.post_attention_layernorm, context)
            if observer is not None:
                observer.mlp_ran(0, saved)
            outputs.append(y)
        return torch.cat(outputs)

    def _inputs(self, model: Decoder) -> Iterator[tuple[Tensor, LayerContext]]:
        """The states of every batch, and what a layer reads beside them."""
        for given in self._batches:
            batch = given.to(model.device, model.ids_device)
            yield model.model.embed_tokens(batch.input_ids), model.context(batch)

    def go_on(self, states: Tensor) -> None:
        """Stand before the next layer, whose input these states (N, H) are."""
        self.states = states


def _numbered(whole: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The batches with the tokens' numbers in place of their ids."""
    batches, start = [], 0
    for batch in whole:
        numbers = torch.arange(start, start + batch.tokens)
        batches.append(replace(batch, input_ids=numbers))
        start += batch.tokens
    return batches


class HeadMoments(LayerObserver):
    """InputMoments of what the output projection of a lone layer's mixer reads."""

    def __init__(self, model: Decoder) -> None:
        self._mixer = model.layers[0].mixer
        heads, _ = lone_output(model)
        self.moments = InputMoments.empty(heads.heads * heads.head_dim, model.device)

    def mixer_ran(self, layer: int, saved: Any) -> None:
        """Add what every head gave for these tokens."""
        self.moments.add(heads_output(self._mixer, saved).flatten(1))


def lone_output(model: Decoder) -> tuple[HeadSlices, Linear]:
    """The heads of a model of one layer, and the projection that reads them."""
    heads = layer_heads(model.config, 0)
    return heads, output_of(model, heads)


def output_of(model: Decoder, heads: HeadSlices) -> Linear:
    """The projection that reads the heads of a layer."""
    linear = model.get_submodule(heads.module(heads.output))
    assert isinstance(linear, Linear)
    return linear
