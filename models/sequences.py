"""Log-probabilities of the sequences of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.runtime.ranks import Ranks
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.moe import Routed, balance_of
from models.layers.packed_batch import PackedBatch, Sequences


def sequences_of(batch: PackedBatch) -> Sequences:
    """The sequences of a batch. Raises `ValueError` where it is not divided into any."""
    if batch.sequences is None:
        raise ValueError("the batch does not say which sequences its trained tokens belong to")
    return batch.sequences


def batch_log_probs(
    model: Decoder, batch: PackedBatch, settings: StepSettings = DEFAULT_SETTINGS
) -> tuple[Tensor, Tensor | None]:
    """log p of every sequence's trained tokens (S,), fp32 or wider, and the router's loss.

    A batch in host memory is sent to the device; the host does not wait. The router's balancing
    loss (), of all tokens of the batch and times its factor, is None where the model or the
    settings ask for none.

    Where the context is split, every rank has the sums of whole sequences, and the loss that it
    makes of them is to be divided by `Decoder.context_ranks.size`: the parts of all ranks, and
    their gradients, then add up to the loss and to its gradients. Raises `ValueError` for a batch
    without `sequences`.
    """
    sequences_of(batch)
    batch = model.own_slice(batch).to(model.device, model.ids_device)
    factor = model.router_factor(settings)
    routed: Routed | None = [] if factor else None
    x = model.hidden_states(batch, settings, routed)
    trained = model.model.norm(x.index_select(0, batch.trained))
    sequences = sequences_of(batch)
    where = sequences.slots, sequences.shape
    sums = model.head.log_probs(trained, batch.targets, *where, settings.loss_chunk_tokens)
    ranks = model.context_ranks
    if ranks.size > 1:
        sums = summed(sums, ranks)
    if not routed:
        return sums, None
    balance = factor * ranks.size * balance_of(routed, batch, ranks)
    return sums, balance.to(sums.dtype)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = x.clone()
        ranks.all_reduce(total).wait()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        total = dy.clone()
        ctx.ranks.all_reduce(total).wait()
        return total, None


def summed(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of x over ranks, each of which has a part of the loss that reads it."""
    total: Tensor = _Summed.apply(x, ranks)
    return total
