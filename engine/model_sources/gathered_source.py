"""A fully fine-tuned model as a source, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.stops import with_stops
from engine.model_sources.interface.view import ModelSourceView
from models.decoder import Decoder
from models.sharding import WholeParameters
from models.tensor_layout import Layout, carried_prefixes


class GatheredSource(ModelSourceView):
    """A model source whose tensors are gathered from all ranks when they are asked for.

    The rank that writes the model reads the tensors, in the order of `names`; every other rank
    calls `follow` meanwhile. Memory holds one layer, or one matrix of the vocabulary, and no more.
    """

    def __init__(self, base: ModelSource, model: Decoder, stops: Iterable[int] = ()) -> None:
        super().__init__(base)
        self._generation_config = with_stops(base, stops)
        self._whole, self._dtype = WholeParameters(model), model.dtype
        self._layout = Layout.of_names(base.config, base.names())
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._owners: dict[str, str] = {}
        for name, shape in self._whole.shapes.items():
            parts = self._layout.parts(name, shape)
            self._shapes |= parts
            self._owners |= dict.fromkeys(parts, name)
        others = carried_prefixes(base.config)
        self._others = {name for name in base.names() if name.startswith(others)}
        self._divided: tuple[str, dict[str, Tensor]] = "", {}

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._generation_config

    def names(self) -> list[str]:
        return [*self._shapes, *self._others]

    def tensor(self, name: str) -> Tensor:
        """A tensor; a collective where its parameter is another than before."""
        if name in self._others:
            return self.base.tensor(name)
        owner = self._owners[name]
        if self._divided[0] != owner:
            self._divided = owner, self._layout.divide(owner, self._whole.parameter(owner))
        return self._divided[1][name].cpu()

    def follow(self) -> None:
        """What a rank does while another reads every tensor."""
        for name in self._whole.shapes:
            self._whole.parameter(name)

    def finish(self) -> None:
        """Ask for what was not read, where writing has failed: others still follow."""
        names, last = list(self._whole.shapes), self._divided[0]
        for name in names[names.index(last) + 1 if last else 0 :]:
            self._whole.parameter(name)

    def codes(self, name: str) -> None:
        """None: the tensors of a model whose every weight was trained are dense."""

    def stored_as(self, name: str) -> None:
        """None: they are in no file."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name) if name in self._others else self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name) if name in self._others else self._dtype
