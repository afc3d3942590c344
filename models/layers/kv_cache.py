"""Keys, values and states of the tokens of one sequence.

An attention layer stores keys and values, a Gated DeltaNet layer a state of fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config.model_config import ModelConfig


@dataclass
class DeltaState:
    """The last inputs of the convolution (1, J - 1, C), and the rule's memory (1, Hv, K, V)."""

    inputs: Tensor
    memory: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DeltaState:
        """The state before any token; the memory is fp32 or wider."""
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        channels = 2 * keys * key_dim + values * value_dim
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(1, config.linear_conv_kernel_dim - 1, channels, dtype=dtype, device=device),
            torch.zeros(1, values, key_dim, value_dim, dtype=wide, device=device),
        )


class KVCache:
    """Preallocated (2, capacity, kv_heads, head_dim) per attention layer; `length` are filled.

    `states` holds the Gated DeltaNet layers' by their index.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        linear = [kind == "linear_attention" for kind in config.layer_types]
        self.layers = [
            torch.empty(
                (2, 0) if skip else (2, capacity, config.kv_heads(layer), config.head_dim),
                dtype=dtype,
                device=device,
            )
            for layer, skip in enumerate(linear)
        ]
        self.states = {
            layer: DeltaState.empty(config, dtype, device)
            for layer, is_linear in enumerate(linear)
            if is_linear
        }
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
