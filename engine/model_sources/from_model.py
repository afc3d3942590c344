"""A fully fine-tuned model as a model source."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import ModelSourceView
from models.decoder import Decoder
from models.tensor_layout import Layout, carried_prefixes


class TrainedSource(ModelSourceView):
    """A model source whose tensors are those of a trained model, named and divided as in `base`.

    The other parts of the model (`models.tensor_layout.carried_prefixes`) are those of `base`.
    """

    def __init__(self, base: ModelSource, model: Decoder) -> None:
        super().__init__(base)
        layout = Layout.of_names(base.config, base.names())
        self._tensors = {
            part: tensor
            for name, parameter in model.named_parameters()
            for part, tensor in layout.divide(name, parameter.detach().cpu()).items()
        }
        others = carried_prefixes(base.config)
        self._tensors |= {n: base.tensor(n) for n in base.names() if n.startswith(others)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype
