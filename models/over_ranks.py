"""Divide a model's work over ranks: a batch's tokens.

Context parallel (`split_context`): each rank of a group computes a slice of every batch of a loss,
and mixes tokens for a share of the heads (`models.parallel`). All are given the same batches; the
losses and the gradients of all add up to those of the batch.
"""

from __future__ import annotations

from kernels.runtime.ranks import Ranks
from models.decoder import Decoder


def split_context(model: Decoder, ranks: Ranks) -> None:
    """Let each of `ranks` compute a slice of every batch of a loss.

    Raises `ValueError` for heads that cannot be shared equally, and for recorded layers.
    """
    if model.graphs is not None:
        raise ValueError("layers that exchange heads with other processes cannot be recorded")
    for layer in model.layers:
        layer.mixer.copies(ranks.size)
    model.context_ranks = ranks
