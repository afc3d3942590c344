"""Plan the memory that choosing and repairing by calibration rows takes."""

from __future__ import annotations

import math

from engine.config.choices import Quantization
from engine.memory.merging import verification_peak
from engine.pruning.calibration import TOKENS_PER_BATCH
from kernels.loss.linear_cross_entropy import chunk_tokens
from models.config.model_config import ModelConfig
from models.head_slices import layer_heads
from models.tensor_names import expected_tensors, is_quantised

_FP64, _FP32 = 8, 4
_STATES = 4
"""Copies of the states: at the entrance, in the layer that reads them, its outputs, and joined."""
_GAP_STATES = 2
"""More of them where layers go: what a gap would have made, and what is missing of it."""
_MATRICES = 5
"""Of the inputs' width squared in fp64: sums, their mean, damped, its factor and its inverse."""
_MIXED, _INNER = 4, 3
"""Of a batch: states, normed, mixed and added, beside q, k, v and o; gate, up and their product."""
_WEIGHTS = 3
"""Of the projection in fp64: as it is, as it becomes, and what it is solved for."""
_BYTES: dict[Quantization, float] = {"nf4": 0.53, "int8": 1.01}
"""Of a weight with its scales."""
_LENGTHS = 4
"""In fp32 of what heads give: it, its products with a matrix each, those with itself, lengths."""


def calibration_peak(
    config: ModelConfig,
    tokens: int,
    *,
    compute: int,
    stored: int,
    channels: bool,
    gaps: int | None = None,
) -> int:
    """The most bytes that a pass over calibration rows takes, layer by layer.

    `compute` and `stored` are bytes of an element while computing and as written. `channels` are
    those of feed-forward parts, else heads; with `gaps` whole layers go, and so many at most are
    repaired, else all. A model that is whole in memory, which comparing layers takes, comes on top
    (`weight_bytes`). For Llama-3-8B and 32,768 tokens in fp32: 2.1 GB of states and 0.5 GB of what
    the output projection reads, 1.3 GB of a layer, 1.1 GB of repaired weights, and the more of 0.8
    GB of a batch in a layer and 1.1 GB of moments and weights in fp64.
    """
    width, heads = config.hidden_size, _widest_output(config)
    inputs = config.intermediate_size if channels else heads
    layer = verification_peak(config) // 4 * compute
    copies = _STATES if gaps is None else _STATES + _GAP_STATES
    states = (copies * width + heads) * tokens * compute
    batch = min(tokens, TOKENS_PER_BATCH)
    working = batch * (_MIXED * (width + heads) + _INNER * _inner(config)) * compute
    working += batch * inputs * _FP64
    sums = _MATRICES * inputs * inputs * _FP64
    weights = _WEIGHTS * inputs * width * _FP64
    fitted = config.num_hidden_layers if gaps is None else gaps
    repaired = fitted * inputs * width * stored
    # While rows run there are the sums alone; while a layer is fitted, no rows run.
    rows_or_fit = max(working + inputs * inputs * _FP64, sums + weights)
    return states + layer + rows_or_fit + repaired


def weight_bytes(config: ModelConfig, compute: int, quantization: Quantization | None) -> int:
    """Bytes of all weights of a model while it computes."""
    quantised = compute if quantization is None else _BYTES[quantization]
    shapes = expected_tensors(config).items()
    each = (math.prod(n) * (quantised if is_quantised(name) else compute) for name, n in shapes)
    return math.ceil(sum(each))


def scoring_peak(config: ModelConfig, batch: int, *, compute: int, gradient: bool) -> int:
    """The most bytes of scoring heads by `l2-output`, or by `gradient`, beside the whole model.

    For `l2-output` there is a matrix of each head and what a batch gives, of so many tokens; for
    `gradient` what every layer saves of a batch, which is the longest row, the logits of some of
    its tokens, and all output projections, dense, with their gradients.
    """
    width, heads, layers = config.hidden_size, _widest_output(config), config.num_hidden_layers
    token = (_MIXED * (width + heads) + _INNER * _inner(config)) * compute
    if not gradient:
        grams = layers * heads * config.head_dim * _FP32
        return grams + batch * (token + _LENGTHS * heads * _FP32)
    rows = min(batch, chunk_tokens(config.vocab_size, compute, gpu=False))
    logits = rows * config.vocab_size * compute
    return layers * (batch * token + 2 * heads * width * compute) + logits


def _inner(config: ModelConfig) -> int:
    """Activations of a token inside a feed-forward part, or all of its experts."""
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    return max(config.intermediate_size, routed + config.shared_expert_intermediate_size)


def _widest_output(config: ModelConfig) -> int:
    """The most inputs that an output projection of heads reads."""
    layers = (layer_heads(config, index) for index in range(config.num_hidden_layers))
    return max(heads.heads * heads.head_dim for heads in layers)
