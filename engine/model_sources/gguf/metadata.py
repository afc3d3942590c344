"""Read single values of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError

_MISSING = object()


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
