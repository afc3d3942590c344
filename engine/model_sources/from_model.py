"""A fully fine-tuned model as a checkpoint, for the writer of directories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.model_sources.base import Checkpoint
from models.decoder import Decoder
from models.tensor_layout import Layout, carried_prefixes


class TrainedCheckpoint:
    """A checkpoint whose tensors are a model's parameters, for the writer of directories.

    They are named and divided as in the source, whose other parts it has too.
    """

    def __init__(self, source: Checkpoint, model: Decoder) -> None:
        self._source = source
        layout = Layout.of_names(source.config, source.names())
        self._tensors = {
            part: tensor
            for name, parameter in model.named_parameters()
            for part, tensor in layout.divide(name, parameter.detach().cpu()).items()
        }
        others = carried_prefixes(source.config)
        self._tensors |= {n: source.tensor(n) for n in source.names() if n.startswith(others)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype
