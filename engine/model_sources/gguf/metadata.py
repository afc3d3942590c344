"""Read single values of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError

_MISSING = object()
# Last parts of keys that are read, and what stands there: a file that has something else was made
# by no converter.
_TEXTS = (
    "general.architecture",
    "general.type",
    "adapter.type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "rope.scaling.type",
    "tokenizer.huggingface.json",
)
_TEXT_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_NUMBER_LISTS = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
_NUMBERS = (
    "_token_id",
    ".add_bos_token",
    ".add_eos_token",
    ".add_space_prefix",
    ".context_length",
    ".nextn_predict_layers",
    "adapter.lora.alpha",
    "split.count",
    "split.no",
)


def check_kinds(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the type of a value that is read, or None.

    Everything else is left to who reads it.
    """
    for key, value in metadata.items():
        wanted: tuple[str, type | tuple[type, ...]] | None = None
        if key.endswith(_TEXTS) or key.startswith("tokenizer.chat_template"):
            wanted = "a text", str
        elif key.endswith(_TEXT_LISTS):
            wanted = "an array of texts", list
        elif key.endswith(_NUMBER_LISTS):
            wanted = "an array of numbers", np.ndarray
        elif key.endswith(_NUMBERS):
            wanted = "a number", (int, float)
        if wanted is not None and not isinstance(value, wanted[1]):
            return f"{key} is {str(value)[:60]}; expected {wanted[0]}"
    return None


class Keys:
    """The metadata keys below one architecture's name."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, source: str) -> None:
        self._metadata = metadata
        self._arch = arch
        self.source = source

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """The value as it is stored. Raises `CheckpointError` where there is none."""
        value = self._metadata.get(f"{self._arch}.{key}", default)
        if value is _MISSING:
            raise CheckpointError(f"{self.source} lacks the metadata key {self._arch}.{key}.")
        return value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A count; one that is given per layer must be the same in every layer."""
        value = self.value(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(
                f"{self.source}: {self._arch}.{key} is {str(value)[:80]}; expected one integer."
            )
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number that was stored in 32 bits, as the shortest decimal that rounds to it."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"{self.source}: {self._arch}.{key} is {str(value)[:80]}; expected a number."
            )
        return float(str(np.float32(value)))
