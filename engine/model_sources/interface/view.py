"""Model sources that change some answers, or the names, of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import outside_layers, row_parts, split_rows
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight


def with_key(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`raw` with `key` set where the decoder's keys are."""
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        return {**raw, "text_config": {**text, key: value}}
    return {**raw, key: value}


class ModelSourceView:
    """A `ModelSource` that answers as `base` does, but for what a subclass overrides."""

    def __init__(self, base: ModelSource) -> None:
        self.base = base
        self.path = base.path
        self.config = base.config
        self.raw_config = base.raw_config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.base.generation_config

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self.base.tensor(name)

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        return self.base.codes(name)

    def stored_as(self, name: str) -> str | None:
        return self.base.stored_as(name)

    def release(self, name: str) -> None:
        self.base.release(name)

    def tokenizer_json(self) -> str | None:
        return self.base.tokenizer_json()

    def tokenizer_model(self) -> Path | None:
        return self.base.tokenizer_model()

    def tokenizer_config(self) -> dict[str, Any]:
        return self.base.tokenizer_config()

    def chat_template(self, name: str = "default") -> str | None:
        return self.base.chat_template(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.base.tokenizer_files()

    def digest(self) -> str:
        return self.base.digest()


class LayersView(ModelSourceView):
    """A view whose subclasses change tensors of layers alone."""

    def row_parts(self, name: str) -> Iterator[torch.Tensor]:
        """Tensor `name` in parts: those of the base, if it is not of a layer."""
        return row_parts(self.base, name) if outside_layers(name) else split_rows(self.tensor(name))


class RenamedView(LayersView):
    """A view whose layers' tensors have other names; `outer` has the base's name of each."""

    def __init__(self, base: ModelSource, outer: Mapping[str, str]) -> None:
        super().__init__(base)
        self._outer = outer

    def names(self) -> list[str]:
        return list(self._outer)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._outer[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._outer[name])

    def tensor(self, name: str) -> torch.Tensor:
        return self.base.tensor(self._outer[name])

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        return self.base.codes(self._outer[name])

    def stored_as(self, name: str) -> str | None:
        return self.base.stored_as(self._outer[name])

    def release(self, name: str) -> None:
        self.base.release(self._outer[name])
