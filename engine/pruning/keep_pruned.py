"""Training a pruned model without bringing a pruned head back.

A head is off while the columns of its layer's output projection that read it are zero. They would
be the first thing to come back: what the head computes is not zero, so they have a gradient. For
every such column

    with LoRA           the column of A is held at zero: W + s B A has W's zero in it, whatever B
                        is (and DoRA scales it by a number);
    when all is trained the column of W itself is held at zero.

Its gradient is put to zero, so that it counts neither in the norm nor in AdamW's moments, and the
column again after every step: a moment of zero that is kept in 8 bits need not come back as zero.
The head's other rows get no gradient then either, since nothing reads what they make.
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

from engine.model_sources.pruning_record import (
    HeadMap,
    check_heads,
    columns_of,
    head_shape,
    read_pruning,
)
from models.decoder import Decoder
from models.layers.block import DecoderLayer
from models.layers.linear import Linear

log = logging.getLogger(__name__)


def hold_pruned(model: Decoder, optimizer: Optimizer, source: Path) -> int:
    """Keep the heads off that the `pruning.json` in `source` names; returns their number.

    Call it once, when what is to be trained requires a gradient. Raises `CheckpointError` where the
    file is damaged or of another model.
    """
    pruning = read_pruning(source)
    if pruning is None or not pruning.heads:
        return 0
    check_heads(pruning, model.config, source)
    held = _held(model, pruning.heads)
    for tensor, columns in held:
        tensor.register_hook(_without(columns))
    put_out = partial(_put_out, held)
    put_out()
    optimizer.register_step_post_hook(put_out)
    count = sum(map(len, pruning.heads.values()))
    log.info("%d pruned attention heads stay pruned", count)
    return count


def _output(block: DecoderLayer) -> Linear:
    """The projection that reads the heads' outputs."""
    if block.self_attn is not None:
        return block.self_attn.o_proj
    assert block.linear_attn is not None
    return block.linear_attn.out_proj


def _held(model: Decoder, heads: HeadMap) -> list[tuple[Tensor, Tensor]]:
    """The trained tensors (rows, columns) with the columns in which they must be zero."""
    held: list[tuple[Tensor, Tensor]] = []
    for layer, gone in heads.items():
        block, dim = model.layers[layer], head_shape(model.config, layer)[1]
        linear = _output(block)
        columns = torch.tensor(columns_of(gone, dim), device=model.device)
        if isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad:
            held.append((linear.weight, columns))
        if linear.lora_A is not None:
            held.append((linear.lora_A, columns))
    return held


@torch.no_grad()
def _put_out(held: list[tuple[Tensor, Tensor]], *_: Any) -> None:
    for tensor, columns in held:
        tensor.index_fill_(1, columns, 0)


def _without(columns: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that gives a gradient (rows, columns) zeros in these columns."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient.index_fill(1, columns, 0)

    return hook
