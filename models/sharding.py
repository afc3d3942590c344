"""Divide a model among ranks, and keep step without a batch."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from kernels.runtime.ranks import Ranks
from kernels.vocabulary.shard import own_rows
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings


@runtime_checkable
class SharedPasses(Protocol):
    """Layers' weights for which all ranks must run the same passes."""

    def idle_forward(self) -> None:
        """The collectives of a forward pass."""

    def idle_backward(self) -> None:
        """The collectives of a backward pass."""


def shard_vocabulary(model: Decoder, ranks: Ranks) -> None:
    """Keep this rank's rows of the embedding and of the head alone.

    Lookups, the loss of next tokens and logits are then collectives. Raises `ValueError` where the
    embedding lies on the host, or where rows are divided already.
    """
    if model.vocabulary is not None:
        raise ValueError("the vocabulary of this model is divided already")
    vocab_size, width = model.model.embed_tokens.shape
    rows = own_rows(vocab_size, width, ranks)
    model.model.embed_tokens.keep_rows(rows, ranks)
    if model.lm_head is not None:
        model.lm_head.keep_rows(rows)
    model.vocabulary = ranks


def idle_pass(
    model: Decoder,
    settings: StepSettings = DEFAULT_SETTINGS,
    *,
    num_items: float | None = None,
    loss_scale: float = 1.0,
) -> None:
    """Everything that a micro-batch sends, for a rank that has none while others have one.

    With `num_items`, which is the others', it goes forward and backward, and a trained head gets
    the gradient of the others' tokens; without, forward alone.
    """
    embedding, stream, backward = (
        model.model.embed_tokens,
        model.weight_stream,
        num_items is not None,
    )
    shared = stream if isinstance(stream, SharedPasses) else None
    none = torch.empty(0, dtype=torch.int64, device=model.device)
    with torch.set_grad_enabled(backward):
        rows = embedding(none) if model.vocabulary is not None else None
        if shared is not None:
            shared.idle_forward()
        if model.vocabulary is not None:
            states = torch.empty(
                0, model.config.hidden_size, dtype=model.dtype, device=model.device
            )
            states.requires_grad_(backward)
            divisor = (num_items or 1.0) / loss_scale
            chunk, terms = settings.loss_chunk_tokens, settings.loss_terms
            loss = model.head.loss(states, none, divisor, chunk, None, terms)
            if backward:
                loss.backward()
    if backward and shared is not None:
        shared.idle_backward()
    if backward and rows is not None and rows.requires_grad:
        rows.backward(torch.zeros_like(rows))
