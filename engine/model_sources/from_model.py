"""A fully fine-tuned model as a model source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.stops import with_stops
from engine.model_sources.interface.view import ModelSourceView
from models.decoder import Decoder
from models.tensor_layout import Layout, carried_prefixes


class TrainedSource(ModelSourceView):
    """A model source whose tensors are those of a trained model, named and divided as in `base`.

    The other parts of the model (`models.tensor_layout.carried_prefixes`) are those of `base`.
    `stops` are the ids that training taught as the end of an answer.
    """

    def __init__(self, base: ModelSource, model: Decoder, stops: Iterable[int] = ()) -> None:
        super().__init__(base)
        self._generation_config = with_stops(base, stops)
        layout = Layout.of_names(base.config, base.names())
        self._tensors = {
            part: tensor
            for name, parameter in model.named_parameters()
            for part, tensor in layout.divide(name, parameter.detach().cpu()).items()
        }
        others = carried_prefixes(base.config)
        self._tensors |= {n: base.tensor(n) for n in base.names() if n.startswith(others)}

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._generation_config

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def codes(self, name: str) -> None:
        """None: the tensors of a model whose every weight was trained are dense."""

    def stored_as(self, name: str) -> None:
        """None: they are in no file."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype
