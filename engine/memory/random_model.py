"""Models of random weights, to measure what a size needs."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, ConfigError
from engine.memory.model_shapes import preset_raw, unknown_model
from engine.model_sources.interface.checks import quick_digest, read_config
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.storage.home import expanded
from engine.storage.safe_files import read_json_object
from models.tensor_names import expected_tensors

log = logging.getLogger(__name__)


def open_base(model: str, random_weights: bool) -> ModelSource:
    """The model, or one of random bfloat16 weights of its shape. Raises `ConfigError`.

    The shape is that of a config.json, in a folder or by itself, or of a size by its name.
    """
    if not random_weights:
        return open_model_source(model)
    path = expanded(model)
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file, ConfigError) if file.is_file() else preset_raw(model)
    if raw is None:
        raise unknown_model(model)
    log.warning("%s: its weights are random; what is made of them measures memory and time", model)
    return RandomModel(path, raw)


class RandomModel:
    """A `ModelSource` without tokenizer whose tensors are drawn when they are asked for.

    A tensor follows from its name: it is the same every time. Matrices have a standard deviation of
    one by the root of their columns, vectors are ones.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any]) -> None:
        self.path, self.raw_config = path, raw_config
        self.config = read_config(raw_config, str(path))
        self.generation_config: dict[str, Any] = {}
        self._shapes = expected_tensors(self.config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path} has no tensor named {name!r}.")
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return empty.normal_(0.0, shape[-1] ** -0.5, generator=generator)

    def codes(self, name: str) -> None:
        """None: nothing is quantised."""

    def stored_as(self, name: str) -> None:
        """None: nothing is quantised."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def digest(self) -> str:
        return quick_digest(self.raw_config, [])

    def tokenizer_json(self) -> None:
        """None: there is no tokenizer."""

    def tokenizer_model(self) -> None:
        """None: there is no tokenizer."""

    def tokenizer_config(self) -> dict[str, Any]:
        return {}

    def chat_template(self, name: str = "default") -> None:
        """None: there is no tokenizer."""

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}
