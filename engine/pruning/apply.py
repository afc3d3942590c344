"""Take pruned heads out of a model's tensors, one tensor at a time.

    zero        columns of the output projection and rows of the input projections that belong to
                the head become zeros, those of keys and values where no living head reads them.
                Shapes stay.
    structural  the same rows and columns are left out, with whatever else there is one of for each
                head, and the configuration says how many heads there are.

Which rows and columns these are is in `engine.pruning.head_slices` and
`engine.pruning.delta_heads`. What is not named there is passed on as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import ModelSourceView
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.head_slices import Heads, Indices
from models.config.heads_per_layer import PER_LAYER
from models.config.model_config import ModelConfig


class Slices:
    """Per tensor, the dimension and the indices that belong to pruned heads."""

    def __init__(
        self, layers: Sequence[Heads], off: Mapping[int, set[int]], *, cut: bool = False
    ) -> None:
        """`off` are all heads that are to be gone, those that were already among them."""
        self._slices: Indices = {}
        for heads in layers:
            gone = off.get(heads.layer, set())
            if gone:
                self._slices |= heads.indices(gone, cut)

    def zero(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy with zeros where pruned heads were."""
        if name not in self._slices:
            return tensor
        dim, index = self._slices[name]
        return tensor.index_fill(dim, index, 0)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy without what belongs to pruned heads."""
        if name not in self._slices:
            return tensor
        dim, index = self._slices[name]
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[index] = False
        return tensor.index_select(dim, torch.nonzero(keep).flatten())

    def cut_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `cut` leaves."""
        if name not in self._slices:
            return shape
        dim, index = self._slices[name]
        return tuple(n - len(index) if d == dim else n for d, n in enumerate(shape))


class PrunedSource(ModelSourceView):
    """A model source without the pruned heads: they are cut out of its tensors."""

    def __init__(self, base: ModelSource, slices: Slices, counts: Mapping[str, Any]) -> None:
        """`counts` are what the configuration says of the heads that the layers keep."""
        super().__init__(base)
        self._slices = slices
        raw = base.raw_config
        nested = raw.get("text_config")  # of a model that has other parts beside its decoder
        self.raw_config = (
            raw | {"text_config": _counted(nested, counts)}
            if isinstance(nested, dict)
            else _counted(raw, counts)
        )
        self.config = ModelConfig.from_dict(self.raw_config)

    def tensor(self, name: str) -> Tensor:
        return self._slices.cut(name, self.base.tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slices.cut_shape(name, self.base.shape(name))


def _counted(raw: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `counts`; numbers for each layer do not outlive one for all of them."""
    stale = PER_LAYER if "num_attention_heads" in counts else ()
    return {key: value for key, value in raw.items() if key not in stale} | dict(counts)


def counts_per_layer(
    config: ModelConfig, layers: Sequence[Heads], off: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Keys of the configuration of a model whose layers lose the heads `off`, each its own.

    Layers without attention have the largest numbers in the lists, where nothing reads them.
    """
    left = {}
    for heads in layers:
        gone = set(off.get(heads.layer, ()))
        left[heads.layer] = heads.heads - len(gone), heads.kv_heads - len(heads.dead_groups(gone))
    most = tuple(map(max, zip(*left.values(), strict=True)))
    counts: dict[str, Any] = dict(layers[0].counts(*most))
    for place, key in enumerate(PER_LAYER):
        counts[key] = [left.get(n, most)[place] for n in range(config.num_hidden_layers)]
    return counts


def refuse_indivisible(config: ModelConfig, heads: int, source: Path) -> None:
    """Raise `ConfigError` for a llama that transformers would not load with `heads` heads."""
    if config.model_type == "llama" and config.hidden_size % heads:
        raise ConfigError(
            f"{source}: a llama with {heads} heads and hidden_size {config.hidden_size} is refused "
            "by transformers, which wants a number of heads that divides it. Ask for another "
            "--fraction, or use --mode zero."
        )


def still_off(layers: Sequence[Heads], dead: HeadMap, cut: HeadMap) -> HeadMap:
    """Heads that stay in a cut model and add nothing, numbered as they then are."""
    found: HeadMap = {}
    for heads in layers:
        gone = set(cut.get(heads.layer, ()))
        kept = [head for head in range(heads.heads) if head not in gone]
        places = {head: place for place, head in enumerate(kept)}
        left = tuple(places[h] for h in dead.get(heads.layer, ()) if h in places)
        if left:
            found[heads.layer] = left
    return found
