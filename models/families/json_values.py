"""Read single values of a `config.json`; errors name the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

BOUNDS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (4, 1024),
    "max_position_embeddings": (1, 2**24),
    "num_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "moe_intermediate_size": (1, 2**20),
    "shared_expert_intermediate_size": (1, 2**20),
    "decoder_sparse_step": (1, 1024),
    "no_rope_layer_interval": (1, 1024),
    "max_window_layers": (0, 2**20),
    "full_attention_interval": (1, 1024),
    "linear_conv_kernel_dim": (1, 64),
    "linear_key_head_dim": (1, 1024),
    "linear_value_head_dim": (1, 1024),
    "linear_num_key_heads": (1, 1024),
    "linear_num_value_heads": (1, 1024),
}
_LARGEST_ID = 2**31 - 1


def integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer inside its bounds; `default` where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        value = default
    low, high = BOUNDS[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        given = repr(value) if key in raw else "missing"
        raise ValueError(f"{key} is {given}; expected an integer from {low} to {high}")
    return value


def boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; `default` where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value


def fraction(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A number between 0 and 1."""
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{key} is {value!r}; expected a number between 0 and 1")
    return float(value)


def positive(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite number."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; expected a positive finite number")
    return float(value)


def token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id or a list of them; -1 and null are none."""
    value = raw.get(key)
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not -1 <= token <= _LARGEST_ID:
            raise ValueError(f"{key} is {value!r}; expected a token id or a list of them")
    return tuple(token for token in ids if token >= 0)


def layer_indices(raw: Mapping[str, Any], key: str, layers: int) -> frozenset[int]:
    """A list of layer numbers; null is none."""
    value = raw.get(key)
    value = () if value is None else value
    good = isinstance(value, list | tuple) and all(
        type(index) is int and 0 <= index < layers for index in value
    )
    if not good:
        raise ValueError(f"{key} is {value!r}; expected a list of layers from 0 to {layers - 1}")
    return frozenset(value)


def listed(names: Iterable[str]) -> str:
    """Names out of a file in one line: those with characters that do not print are quoted."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)
