"""`pruning.json`: which attention heads of its model were pruned, and how.

`pruned_heads` maps a layer's number to the query heads (value heads of a linear attention) that
must add nothing to the model's output, counted as in the weights in the same folder. In mode `zero`
their slices are zeros. In mode `mask` the weights are whole and the columns of the output
projection are put to zero as they are read, so that deleting the file brings the heads back. In
mode `structural` they are cut out of the weights, and not in the map.

`digest` is the SHA-256 of everything else in the file, as JSON with sorted keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.choices import PRUNE_MODES
from engine.config.numbers import is_count
from engine.errors import CheckpointError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import LayersView
from engine.storage.safe_files import read_json_object
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.head_slices import layer_heads
from models.tensor_layout import path_in_file

PRUNING = "pruning.json"
FORMAT = "engine-pruning-1"
HeadMap = dict[int, tuple[int, ...]]
"""Layer -> heads, both in ascending order."""


@dataclass(frozen=True)
class Pruning:
    """A `pruning.json` that was read: its mode, the pruned heads, and all it says."""

    mode: str
    heads: HeadMap
    record: Mapping[str, Any]


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the format's name and the digest of everything else."""
    whole = {**record, "format": FORMAT}
    return whole | {"digest": _digest(whole)}


def head_map(layers: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    """Layer -> heads as JSON has it, without layers that have none."""
    return {str(layer): sorted(heads) for layer, heads in sorted(layers.items()) if heads}


def read_pruning(folder: Path) -> Pruning | None:
    """The pruning of the model in `folder`; None where there is none.

    A file of that name that another program wrote is no concern of this one. Raises
    `CheckpointError` for a damaged or edited file.
    """
    path = folder / PRUNING
    if not folder.is_dir() or not path.exists():
        return None
    record = read_json_object(path)
    if record.get("format") != FORMAT:
        return None
    heads = _heads(record.get("pruned_heads"))
    if (
        record.get("digest") != _digest(record)
        or record.get("mode") not in PRUNE_MODES
        or heads is None
    ):
        raise CheckpointError(
            f"{path} is not as it was written: its digest does not fit. Copy it again from where "
            "the model was pruned; in mode mask, deleting it brings the pruned heads back."
        )
    return Pruning(str(record["mode"]), heads, record)


def carried(pruning: Pruning) -> dict[str, Any]:
    """The record for a copy of the model, in which what was masked has become zeros."""
    return sealed({**pruning.record, "mode": "zero" if pruning.mode == "mask" else pruning.mode})


class MaskedSource(LayersView):
    """A model source whose masked heads read as zeros.

    Raises `CheckpointError` where the mask names a head that the model does not have.
    """

    def __init__(self, base: ModelSource, pruning: Pruning) -> None:
        super().__init__(base)
        check_heads(pruning, base.config, base.path)
        self._columns: dict[str, torch.Tensor] = {}
        for layer, pruned in pruning.heads.items():
            heads = layer_heads(base.config, layer)
            name = path_in_file(base.config, heads.weight(heads.output))
            self._columns[name] = heads.output_columns(pruned)
        self._mask = json.dumps(head_map(pruning.heads))

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`; the columns of masked heads are zeros."""
        tensor = self.base.tensor(name)
        columns = self._columns.get(name)
        return tensor if columns is None else tensor.index_fill(1, columns, 0)

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """The stored codes; None where heads of the tensor are masked."""
        return None if name in self._columns else self.base.codes(name)

    def digest(self) -> str:
        """That of the whole model and the mask: a masked model is another model."""
        return hashlib.sha256(f"{self.base.digest()}{self._mask}".encode()).hexdigest()


def masked(source: ModelSource) -> ModelSource:
    """`source` with the mask in its folder, if there is one."""
    pruning = read_pruning(source.path)
    if pruning is None or pruning.mode != "mask":
        return source
    return MaskedSource(source, pruning)


def check_heads(pruning: Pruning, config: ModelConfig, source: Path) -> None:
    """Raise `CheckpointError` unless the model has every head that `pruning` names."""
    for layer, heads in pruning.heads.items():
        inside = layer < config.num_hidden_layers
        number = layer_heads(config, layer).heads if inside else 0
        if heads[-1] >= number:
            count = f"{number} heads there" if inside else "fewer layers"
            raise CheckpointError(
                f"{source / PRUNING} names heads {list(heads)} of layer {layer}, and the model has "
                f"{count}. The file belongs to another model."
            )


def _digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _heads(value: Any) -> HeadMap | None:
    """The map of layers to heads that JSON holds; None if it is not one."""
    if not isinstance(value, dict):
        return None
    result: HeadMap = {}
    for layer, heads in value.items():
        listed = isinstance(heads, list) and heads and all(type(head) is int for head in heads)
        if not is_count(str(layer)) or not listed or min(heads) < 0:
            return None
        result[int(layer)] = tuple(sorted(set(heads)))
    return dict(sorted(result.items()))
