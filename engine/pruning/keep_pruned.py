"""Keep pruned heads at zero during fine-tuning.

A head is pruned while the columns of its layer's output projection that read it are zero. Training
would change them first: what the head computes is not zero, so they have a gradient. For every such
column

    with LoRA             the column of A stays zero: W + s B A has W's zero in it, whatever B is
                          (and DoRA scales it by a number);
    in full fine-tuning   the column of W itself stays zero.

Its gradient is set to zero, so that it counts neither in the norm nor in AdamW's moments, and the
column again after every step: a moment of zero that is stored in 8 bits need not decode to zero.
The head's other rows get no gradient then either, since nothing reads what they compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.model_sources.pruning_record import HeadMap, check_heads, read_pruning
from models.decoder import Decoder
from models.head_slices import layer_heads
from models.layers.linear import Linear

log = logging.getLogger(__name__)


def pruned_heads(source: Path) -> int:
    """How many heads the `pruning.json` in `source` names. Raises `CheckpointError`."""
    pruning = read_pruning(source)
    return 0 if pruning is None else sum(map(len, pruning.heads.values()))


def hold_pruned(model: Decoder, optimizer: Optimizer, source: Path) -> int:
    """Keep the heads at zero that the `pruning.json` in `source` names; returns their number.

    Call it once, when what is to be trained requires a gradient. Raises `CheckpointError` where the
    file is damaged or of another model.
    """
    pruning = read_pruning(source)
    if pruning is None or not pruning.heads:
        return 0
    check_heads(pruning, model.config, source)
    trained = _trained_columns(model, pruning.heads)
    for tensor, columns in trained:
        tensor.register_hook(_zero_columns(columns))
    zero = partial(_zero, trained)
    zero()
    optimizer.register_step_post_hook(zero)
    count = sum(map(len, pruning.heads.values()))
    log.info("%d pruned attention heads stay pruned", count)
    return count


def _trained_columns(model: Decoder, pruned: HeadMap) -> list[tuple[Tensor, Tensor]]:
    """The trained tensors (rows, columns) with the columns in which they must be zero."""
    result: list[tuple[Tensor, Tensor]] = []
    for layer, numbers in pruned.items():
        heads = layer_heads(model.config, layer)
        linear = model.get_submodule(heads.module(heads.output))
        assert isinstance(linear, Linear)
        columns = heads.output_columns(numbers).to(model.device)
        if isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad:
            result.append((linear.weight, columns))
        if linear.lora_A is not None:
            result.append((linear.lora_A, columns))
    return result


@torch.no_grad()
def _zero(trained: list[tuple[Tensor, Tensor]], *_: Any) -> None:
    for tensor, columns in trained:
        tensor.index_fill_(1, columns, 0)


def _zero_columns(columns: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that gives a gradient (rows, columns) zeros in these columns."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient.index_fill(1, columns, 0)

    return hook
