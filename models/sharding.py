"""Divide a model among ranks, and keep step without a batch."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kernels.runtime.ranks import Ranks, gathered
from kernels.vocabulary.shard import own_rows, rows_per_rank
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.memory.sharded_parameters import ParameterPiece, ShardedParameters
from models.tensor_names import graph_tensors


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
    teacher: Decoder | None = None,
) -> None:
    """Everything that a micro-batch sends, for a rank that has none while others have one.

    With `num_items`, which is the others', it goes forward and backward, and a trained head gets
    the gradient of the others' tokens; without, forward alone. A `teacher` goes forward in between.
    It computes no layer; `PackedBatch.idle` does the same by a pass over one token, which experts
    that ranks divide need.
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
        if teacher is not None and isinstance(teacher.weight_stream, SharedPasses):
            teacher.weight_stream.idle_forward()
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


def shard_parameters(model: Decoder, ranks: Ranks) -> ShardedParameters:
    """Divide everything that full fine-tuning trains: layers, embedding and head.

    The final norm stays whole on every rank. `trained_pieces` are what an optimizer gets.
    """
    sharded = ShardedParameters(ranks, model.device)
    for layer in model.layers:
        sharded.take(layer)
    sharded.reserve()
    model.weight_stream = sharded
    if model.vocabulary is None:
        shard_vocabulary(model, ranks)
    model.requires_grad_(True)
    return sharded


def sharded_parameters(model: Decoder) -> ShardedParameters:
    """The divided layers of a model. Raises `ValueError` where they are not divided so."""
    if not isinstance(model.weight_stream, ShardedParameters):
        raise ValueError("the trained parameters of this model are not divided among ranks")
    return model.weight_stream


def trained_pieces(model: Decoder) -> list[ParameterPiece]:
    """What this rank trains, in the order of the model; without what it has nothing of.

    The final norm, which all ranks have whole, is the last.
    """
    sharded = sharded_parameters(model)
    layers = [piece for pieces in sharded.pieces for piece in pieces]
    ranks = sharded.ranks
    size = torch.Size((model.config.vocab_size, model.config.hidden_size))
    outer = [
        ParameterPiece(name, size, own_rows(size[0], size[1], ranks).start * size[1], weight)
        for name, weight in _outer_rows(model).items()
        if weight.numel()
    ]
    norm = model.model.norm.weight
    return [*outer, *layers, ParameterPiece("model.norm.weight", norm.shape, 0, norm)]


def _outer_rows(model: Decoder) -> dict[str, nn.Parameter]:
    """Name -> this rank's rows of embedding and head."""
    named = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    if model.lm_head is not None:
        weight = model.lm_head.weight
        assert isinstance(weight, Tensor)
        named["lm_head.weight"] = weight
    return {name: weight for name, weight in named.items() if isinstance(weight, nn.Parameter)}


@torch.no_grad()
def finish_gradients(model: Decoder) -> tuple[list[Tensor], list[Tensor]]:
    """Sum the gradient that every rank has whole, after the last pass of a step; a collective.

    Returns the gradients of this rank's parts and the whole ones (`optim.clip.norm_over_ranks`).
    """
    norm = model.model.norm.weight
    wide = torch.promote_types(norm.dtype, torch.float32)
    total = torch.zeros_like(norm, dtype=wide) if norm.grad is None else norm.grad.to(wide)
    ranks = sharded_parameters(model).ranks
    ranks.all_reduce(total).wait()
    norm.grad = total.to(norm.dtype)
    parts = [p.parameter.grad for p in trained_pieces(model)[:-1]]
    return [grad for grad in parts if grad is not None], [norm.grad]


class WholeParameters:
    """Parameters of a divided model as they are now, made whole one after the other.

    All ranks ask for the same ones in the same order: each is a collective, but for those of a
    layer that follow each other.
    """

    def __init__(self, model: Decoder) -> None:
        self._model, self._layers = model, sharded_parameters(model)
        self.shapes = graph_tensors(model.config)
        self._layers.forget()

    @torch.no_grad()
    def parameter(self, name: str) -> Tensor:
        """The whole parameter, on the device; valid until two other layers are asked for."""
        _, kind, number, *_ = [*name.split("."), "", ""]
        if kind == "layers":
            return self._layers.whole_layer(int(number))[name]
        rows = _outer_rows(self._model).get(name)
        return self._model.model.norm.weight.detach() if rows is None else self._rows(name, rows)

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        vocab_size, width = self.shapes[name]
        ranks = self._layers.ranks
        own = rows.new_zeros(rows_per_rank(vocab_size, width, ranks.size), width)
        own[: rows.shape[0]] = rows
        return gathered(ranks, own).view(-1, width)[:vocab_size]
