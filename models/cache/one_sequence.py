"""Keys, values and states of the tokens of one sequence.

An attention layer stores keys and values, a Gated DeltaNet layer a state of fixed size. Layers see
a cache as a `LayerCache`, which may be that of many sequences (`models.cache.many_sequences`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import cached_attention
from models.config.model_config import ModelConfig


@dataclass
class DeltaState:
    """The last inputs of the convolution (B, J - 1, C), and the rule's memory (B, Hv, K, V).

    Those of B sequences; a `KVCache` holds one.
    """

    inputs: Tensor
    memory: Tensor

    @classmethod
    def empty(
        cls, config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: int = 1
    ) -> DeltaState:
        """The states of `rows` sequences before any token; the memory is fp32 or wider."""
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        channels = 2 * keys * key_dim + values * value_dim
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(
                rows, config.linear_conv_kernel_dim - 1, channels, dtype=dtype, device=device
            ),
            torch.zeros(rows, values, key_dim, value_dim, dtype=wide, device=device),
        )


class LayerCache(Protocol):
    """What layers ask of a cache, in a pass over the next tokens of one sequence or several."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """Store k, v (N, kv_heads, head_dim); attention of q (N, heads, head_dim), its shape."""

    def delta_states(self, layer: int) -> Sequence[tuple[slice, DeltaState]]:
        """Tokens of the pass and the state they change: one each of B sequences, or of one."""


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

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """As `LayerCache.attend`, of the next tokens of the sequence."""
        keys, values = self.append(layer, k, v)
        return cached_attention(q.contiguous(), keys, values, window, scale)

    def delta_states(self, layer: int) -> list[tuple[slice, DeltaState]]:
        """As `LayerCache.delta_states`."""
        return [(slice(None), self.states[layer])]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens as filled."""
        self.length += tokens
