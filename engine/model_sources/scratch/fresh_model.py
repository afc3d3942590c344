"""`FreshModel`: a model source whose weights are drawn, not read."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.model_sources.interface.checks import read_config
from engine.model_sources.interface.model_source import TokenizerSource
from engine.model_sources.scratch.initial_weights import initial_tensor, initializer_range
from engine.model_sources.vocabulary.folder import OtherWords
from models.tensor_names import Shapes, expected_tensors


class FreshModel(OtherWords):
    """A model of random weights, and the tokenizer `words` that it will know.

    `raw_config` is what its config.json will say. Tensors are fp32 and follow from `seed` and their
    names. Raises `ConfigError` for a configuration that cannot be used.
    """

    def __init__(
        self,
        path: Path,
        raw_config: dict[str, Any],
        words: TokenizerSource,
        seed: int,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.raw_config, self.words, self.seed = path, raw_config, words, seed
        self.config = read_config(raw_config, str(path))
        self.generation_config = dict(generation_config or {})
        self._deviation = initializer_range(raw_config, str(path))

    @cached_property
    def _shapes(self) -> Shapes:
        return expected_tensors(self.config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"The model {self.path} has no tensor named {name!r}.")
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        return initial_tensor(name, self.shape(name), self.config, self._deviation, self.seed)

    def codes(self, name: str) -> None:
        """None: nothing is quantised."""

    def stored_as(self, name: str) -> None:
        """None: they are in no file."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def digest(self) -> str:
        """It tells this model, with these first weights, from another."""
        text = json.dumps([self.raw_config, self.seed], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
