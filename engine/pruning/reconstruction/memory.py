"""Plan the memory that choosing and repairing by calibration rows takes."""

from __future__ import annotations

import math

from engine.memory.merging import verification_peak
from models.config.model_config import ModelConfig
from models.head_slices import layer_heads
from models.tensor_names import expected_tensors

_FP64 = 8
_STATES = 4
"""Copies of the states: at the entrance, in the layer that reads them, its outputs, and joined."""
_MATRICES = 5
"""Of the inputs' width squared in fp64: sums, their mean, damped, its factor and its inverse."""
_WEIGHTS = 3
"""Of the projection in fp64: as it is, as it becomes, and what it is solved for."""


def calibration_peak(
    config: ModelConfig, tokens: int, *, compute: int, stored: int, channels: bool, whole: bool
) -> int:
    """The most bytes that a pass over calibration rows takes, layer by layer.

    `compute` and `stored` are bytes of an element while computing and as written. `channels` are
    those of feed-forward parts, else heads. With `whole` the model is in memory beside it, which
    is what comparing layers takes. For Llama-3-8B and 32,768 tokens in fp32: 2.1 GB of states,
    1.3 GB of a layer, 0.7 GB of moments, 0.4 GB of weights in fp64 and 1.1 GB of repaired ones.
    """
    width = config.hidden_size
    inputs = config.intermediate_size if channels else _widest_output(config)
    layer = verification_peak(config) // 4 * compute
    states = _STATES * tokens * width * compute
    sums = _MATRICES * inputs * inputs * _FP64
    weights = _WEIGHTS * inputs * width * _FP64
    repaired = config.num_hidden_layers * inputs * width * stored
    total = states + layer + sums + weights + repaired
    if whole:
        total += compute * sum(map(math.prod, expected_tensors(config).values()))
    return total


def _widest_output(config: ModelConfig) -> int:
    """The most inputs that an output projection of heads reads."""
    layers = (layer_heads(config, index) for index in range(config.num_hidden_layers))
    return max(heads.heads * heads.head_dim for heads in layers)
