"""Divide a model's work over ranks: a batch's tokens, or experts.

Context parallel (`split_context`): each rank of a group computes a slice of every batch of a loss,
and mixes tokens for a share of the heads (`models.parallel`). All are given the same batches; the
losses and the gradients of all add up to those of the batch.

Expert parallel (`divide_experts`): each rank has an equal share of the experts of every mixture,
with their adapters; everything else is on all. A rank's gradients of its experts are those of the
tokens of all ranks of the group: they are left out of sums over it. All of them run the same number
of passes, for each pass exchanges tokens; one that has no row computes `PackedBatch.idle()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from kernels.runtime.ranks import ONE_RANK, Ranks, gathered
from models.adapters import adapter_tensors
from models.decoder import Decoder
from models.layers.experts import Experts
from models.memory.sharded_parameters import ShardedParameters
from models.tensor_layout import Layout
from models.tensor_names import graph_tensors


def split_context(model: Decoder, ranks: Ranks) -> None:
    """Let each of `ranks` compute a slice of every batch of a loss.

    Raises `ValueError` for heads that cannot be shared equally, and for recorded layers.
    """
    if model.graphs is not None:
        raise ValueError("layers that exchange heads with other processes cannot be recorded")
    for layer in model.layers:
        layer.mixer.copies(ranks.size)
    model.context_ranks = ranks


def divide_experts(model: Decoder, ranks: Ranks) -> None:
    """Keep this rank's experts alone. Raises `ValueError` where they cannot be divided equally.

    Of a model on the meta device what is loaded later is divided as it is set.
    """
    mixtures = _mixtures(model)
    if not mixtures:
        raise ValueError("the model has no experts to divide over processes")
    for experts in mixtures:
        experts.divide(ranks)


def expert_ranks(model: Decoder) -> Ranks:
    """The ranks that the experts are divided over; one alone where they are not."""
    return next((experts.share.ranks for experts in _mixtures(model)), ONE_RANK)


def expert_parameters(model: Decoder) -> list[nn.Parameter]:
    """Parameters that this rank alone has within the group: those of divided experts."""
    return [
        parameter
        for experts in _mixtures(model)
        if experts.share.ranks.size > 1
        for parameter in experts.parameters()
    ]


def gathered_adapter(model: Decoder) -> dict[str, tuple[Tensor, ...]]:
    """`adapter_tensors` with the pairs of all ranks' experts; all ranks call it together.

    Those of experts are copies.
    """
    tensors, layout = adapter_tensors(model), Layout(nested=model.config.nested)
    for path, experts in model.named_modules():
        if not isinstance(experts, Experts) or experts.share.ranks.size == 1:
            continue
        for name, adapter in experts.adapters().items():
            if adapter.lora_A is None or adapter.lora_B is None:
                continue
            ranks = experts.share.ranks
            both = adapter.lora_A, adapter.lora_B
            a, b = (gathered(ranks, part).flatten(0, 1) for part in both)
            for expert, pair in enumerate(zip(a, b, strict=True)):
                tensors[f"{layout.path(path)}.{expert}.{name}"] = pair
    return tensors


def gathered_experts(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameters' names, with what all ranks have of divided experts.

    All ranks call it together. Those of experts are copies.
    """
    divided, ranks = _names_of_experts(model), expert_ranks(model)
    return {
        name: gathered(ranks, tensor).flatten(0, 1) if name in divided else tensor
        for name, tensor in tensors.items()
    }


def own_experts(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of `gathered_experts` is this rank's, in the same memory."""
    divided, ranks = _names_of_experts(model), expert_ranks(model)
    return {
        name: tensor.chunk(ranks.size)[ranks.rank] if name in divided else tensor
        for name, tensor in tensors.items()
    }


def adapter_paths(model: Decoder) -> list[str]:
    """The paths of `gathered_adapter`, without asking anyone."""
    paths, layout = dict.fromkeys(adapter_tensors(model)), Layout(nested=model.config.nested)
    for path, experts in model.named_modules():
        for name, adapter in experts.adapters().items() if isinstance(experts, Experts) else ():
            if adapter.lora_A is not None:
                every = range(adapter.share.total)
                paths |= dict.fromkeys(f"{layout.path(path)}.{n}.{name}" for n in every)
    return list(paths)


def trained_elements(model: Decoder) -> int:
    """Elements of the parameters that are trained, of all ranks' experts and other parts."""
    if isinstance(model.weight_stream, ShardedParameters):
        return sum(math.prod(shape) for shape in graph_tensors(model.config).values())
    divided, ranks = {id(p) for p in expert_parameters(model)}, expert_ranks(model)
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(p.numel() * (ranks.size if id(p) in divided else 1) for p in trained)


def _names_of_experts(model: Decoder) -> set[str]:
    divided = {id(p) for p in expert_parameters(model)}
    return {name for name, p in model.named_parameters() if id(p) in divided}


def _mixtures(model: Decoder) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]
