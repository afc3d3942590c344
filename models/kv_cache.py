"""Keys and values of the tokens already seen, for one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import ModelConfig


class KVCache:
    """Preallocated (layers, 2, capacity, kv_heads, head_dim); `length` tokens are filled."""

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, capacity, config.num_key_value_heads, config.head_dim)
        self.layers = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (T, kv_heads, head_dim) after the filled part; return all keys and values.

        `length` moves only when `advance` is called, after the last layer. Raises `ValueError`
        when the cache is full.
        """
        end = self.length + k.shape[0]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were asked for")
        store = self.layers[layer]
        store[0, self.length : end] = k
        store[1, self.length : end] = v
        return store[0, :end], store[1, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens as filled."""
        self.length += tokens
