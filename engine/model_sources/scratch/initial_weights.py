"""The first weights of a new model, as transformers draws them.

Matrices are normal with the standard deviation `initializer_range` of config.json (0.02 without
one), biases zero, norms neutral, and the embedding's row of the padding token zero. Gated
DeltaNet's A is uniform in (0.01, 16) and its dt_bias one. Each tensor is drawn by a generator of
its own, which follows from the run's seed and the tensor's name, so that no order of reading
matters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import ConfigError
from models.config.model_config import ModelConfig

DEFAULT_RANGE = 0.02
_DECAYS = (0.01, 16.0)
_GATED_NORM = "linear_attn.norm.weight"
_EMBEDDING = "embed_tokens.weight"


def initializer_range(raw_config: Mapping[str, Any], source: str) -> float:
    """The standard deviation that a config.json asks for. Raises `ConfigError`."""
    value = raw_config.get("initializer_range", DEFAULT_RANGE)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0 or not math.isfinite(value):
        raise ConfigError(
            f"{source}: initializer_range is {value!r}; expected a number above 0 and at most 1, "
            "such as 0.02: the standard deviation of the first weights."
        )
    return float(value)


def initial_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, deviation: float, seed: int
) -> torch.Tensor:
    """The first values, fp32, of the tensor that config.json's model calls `name`."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return torch.zeros(shape)
    if leaf == "dt_bias":
        return torch.ones(shape)
    if len(shape) == 1 and leaf == "weight":
        centred = config.zero_centered_norm and not name.endswith(_GATED_NORM)
        return torch.zeros(shape) if centred else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor = torch.empty(shape)
    if leaf == "A_log":
        return tensor.uniform_(*_DECAYS, generator=generator).log_()
    tensor.normal_(0.0, deviation, generator=generator)
    padding = config.pad_token_id
    if name.endswith(_EMBEDDING) and padding is not None and 0 <= padding < shape[0]:
        tensor[padding] = 0.0
    return tensor
