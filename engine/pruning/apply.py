"""Take pruned heads out of a model's tensors, one by one.

    zero        columns of the output projection and rows of the input projections that belong to
                the head become zeros, those of keys and values where no other head reads them.
                Shapes stay.
    structural  the same rows and columns are left out, with whatever else there is one of for each
                head, and the configuration says how many heads there are.

Which rows and columns these are is in `models.head_slices`. What is not named there is passed on
as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import LayersView
from engine.model_sources.pruning_record import HeadMap
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.heads_per_layer import PER_LAYER
from models.config.model_config import ModelConfig
from models.head_slices import HeadSlices, Indices, layer_heads
from models.tensor_layout import path_in_file


class PrunedSlices:
    """Per tensor of a model source, the dimension and the indices that belong to pruned heads."""

    def __init__(
        self, config: ModelConfig, pruned: Mapping[int, Iterable[int]], *, cut: bool = False
    ) -> None:
        """`pruned` are all heads of a layer that are to be out, earlier pruned ones included."""
        self._indices: Indices = {
            path_in_file(config, name): slices
            for layer, heads in pruned.items()
            for name, slices in layer_heads(config, layer).indices(set(heads), cut).items()
        }

    def zero(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy with zeros where pruned heads were."""
        if name not in self._indices:
            return tensor
        dim, index = self._indices[name]
        return tensor.index_fill(dim, index, 0)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy without what belongs to pruned heads."""
        if name not in self._indices:
            return tensor
        dim, index = self._indices[name]
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[index] = False
        return tensor.index_select(dim, torch.nonzero(keep).flatten())

    def cut_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `cut` leaves."""
        if name not in self._indices:
            return shape
        dim, index = self._indices[name]
        return tuple(n - len(index) if d == dim else n for d, n in enumerate(shape))


class CutSource(LayersView):
    """A model source without the heads `pruned`: they are cut out of its tensors."""

    def __init__(self, base: ModelSource, pruned: HeadMap, counts: Mapping[str, Any]) -> None:
        """`counts` are what the configuration says of the heads that the layers keep."""
        super().__init__(base)
        self._slices = PrunedSlices(base.config, pruned, cut=True)
        raw = base.raw_config
        nested = raw.get("text_config")  # of a model with other parts than its decoder
        self.raw_config = (
            raw | {"text_config": _counted(nested, counts)}
            if isinstance(nested, dict)
            else _counted(raw, counts)
        )
        self.config = ModelConfig.from_dict(self.raw_config)

    def tensor(self, name: str) -> Tensor:
        return self._slices.cut(name, self.base.tensor(name))

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """The stored codes; None for a tensor that heads are cut out of."""
        cut = self.shape(name) != self.base.shape(name)
        return None if cut else self.base.codes(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slices.cut_shape(name, self.base.shape(name))


def _counted(raw: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `counts`; numbers for each layer do not outlive one for all of them."""
    stale = PER_LAYER if "num_attention_heads" in counts else ()
    return {key: value for key, value in raw.items() if key not in stale} | dict(counts)


def remaining(heads: HeadSlices, pruned: HeadMap) -> tuple[int, int]:
    """Heads and key/value heads that a layer keeps."""
    taken = set(pruned.get(heads.layer, ()))
    return heads.heads - len(taken), heads.kv_heads - len(heads.unread_groups(taken))


def counts_per_layer(
    config: ModelConfig, layers: Sequence[HeadSlices], pruned: HeadMap
) -> dict[str, Any]:
    """Keys of the configuration of a model whose layers lose the heads `pruned`, each its own.

    Layers without attention have the largest numbers in the lists, where nothing reads them.
    """
    left = {heads.layer: remaining(heads, pruned) for heads in layers}
    most = tuple(map(max, zip(*left.values(), strict=True)))
    counts: dict[str, Any] = dict(layers[0].counts(*most))
    for index, key in enumerate(PER_LAYER):
        counts[key] = [left.get(n, most)[index] for n in range(config.num_hidden_layers)]
    return counts


def refuse_indivisible(config: ModelConfig, heads: int, source: Path) -> None:
    """Raise `ConfigError` for a llama that transformers would not load with `heads` heads."""
    if config.model_type == "llama" and config.hidden_size % heads:
        raise ConfigError(
            f"{source}: a llama with {heads} heads and hidden_size {config.hidden_size} is refused "
            "by transformers, which wants a number of heads that divides it. Ask for another "
            "--fraction, or use --mode zero."
        )


def renumbered(layers: Sequence[HeadSlices], pruned: HeadMap, cut: HeadMap) -> HeadMap:
    """Those of `pruned` that stay in a model without `cut`, numbered as they are there."""
    result: HeadMap = {}
    for heads in layers:
        taken = set(cut.get(heads.layer, ()))
        staying = [head for head in range(heads.heads) if head not in taken]
        number = {head: index for index, head in enumerate(staying)}
        left = tuple(number[h] for h in pruned.get(heads.layer, ()) if h in number)
        if left:
            result[heads.layer] = left
    return result
