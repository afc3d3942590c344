"""Plan the memory that choosing and repairing by calibration rows takes."""

from __future__ import annotations

import math

from engine.memory.merging import verification_peak
from engine.pruning.calibration import TOKENS_PER_BATCH
from models.config.model_config import ModelConfig
from models.head_slices import layer_heads
from models.tensor_names import expected_tensors

_FP64 = 8
_STATES = 4
"""Copies of the states: at the entrance, in the layer that reads them, its outputs, and joined."""
_MATRICES = 5
"""Of the inputs' width squared in fp64: sums, their mean, damped, its factor and its inverse."""
_MIXED, _INNER = 4, 3
"""Of a batch: states, normed, mixed and added, beside q, k, v and o; gate, up and their product."""
_WEIGHTS = 3
"""Of the projection in fp64: as it is, as it becomes, and what it is solved for."""


def calibration_peak(
    config: ModelConfig, tokens: int, *, compute: int, stored: int, channels: bool, whole: bool
) -> int:
    """The most bytes that a pass over calibration rows takes, layer by layer.

    `compute` and `stored` are bytes of an element while computing and as written. `channels` are
    those of feed-forward parts, else heads. With `whole` the model is in memory beside it, which
    is what comparing layers takes. For Llama-3-8B and 32,768 tokens in fp32: 2.1 GB of states and
    0.5 GB of what the output projection reads, 1.3 GB of a layer, 1.1 GB of repaired weights, and
    the more of 0.8 GB of a batch in a layer and 1.1 GB of moments and weights in fp64.
    """
    width, heads = config.hidden_size, _widest_output(config)
    inputs = config.intermediate_size if channels else heads
    layer = verification_peak(config) // 4 * compute
    states = (_STATES * width + heads) * tokens * compute
    batch = min(tokens, TOKENS_PER_BATCH)
    working = batch * (_MIXED * (width + heads) + _INNER * _inner(config)) * compute
    working += batch * inputs * _FP64
    sums = _MATRICES * inputs * inputs * _FP64
    weights = _WEIGHTS * inputs * width * _FP64
    repaired = config.num_hidden_layers * inputs * width * stored
    # While rows run there are the sums alone; while a layer is fitted, no rows run.
    rows_or_fit = max(working + inputs * inputs * _FP64, sums + weights)
    total = states + layer + rows_or_fit + repaired
    if whole:
        total += compute * sum(map(math.prod, expected_tensors(config).values()))
    return total


def _inner(config: ModelConfig) -> int:
    """Activations of a token inside a feed-forward part, or all of its experts."""
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    return max(config.intermediate_size, routed + config.shared_expert_intermediate_size)


def _widest_output(config: ModelConfig) -> int:
    """The most inputs that an output projection of heads reads."""
    layers = (layer_heads(config, index) for index in range(config.num_hidden_layers))
    return max(heads.heads * heads.head_dim for heads in layers)
