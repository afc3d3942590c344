"""Repair a layer's output by least squares after heads were taken out.

The columns of the output projection that survive are updated so that the layer gives on the
calibration rows what it gave with all heads (`engine.pruning.reconstruction.least_squares`), layer
after layer: later ones are fitted to what the repaired layers before them give. Nothing else
changes, but for the projection's bias where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import LayersView
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.reconstruction.layer_stream import LayerStream, lone_output
from engine.pruning.reconstruction.least_squares import InputMoments, Regression, repaired
from engine.pruning.scores import LayerScores
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.decoder import Decoder
from models.head_slices import HeadSlices
from models.tensor_layout import path_in_file


@dataclass(frozen=True)
class Change:
    """New values of some columns (dim 1) of a tensor, or with `columns` None of all of it."""

    values: Tensor
    columns: Tensor | None = None

    def applied(self, tensor: Tensor) -> Tensor:
        """`tensor` with the change in it."""
        if self.columns is None:
            return self.values
        return tensor.to(self.values.dtype).index_copy(1, self.columns, self.values)


class RepairedSource(LayersView):
    """A model source some of whose tensors have new values in them."""

    def __init__(self, base: ModelSource, changes: Mapping[str, Change]) -> None:
        super().__init__(base)
        self.changes = changes

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, with the new values where there are any."""
        tensor, change = self.base.tensor(name), self.changes.get(name)
        return tensor if change is None else change.applied(tensor)

    def dtype(self, name: str) -> torch.dtype:
        """The type that `tensor` has."""
        change = self.changes.get(name)
        return self.base.dtype(name) if change is None else change.values.dtype

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """The stored codes; None where there are new values."""
        return None if name in self.changes else self.base.codes(name)

    def stored_as(self, name: str) -> str | None:
        """How the files hold the tensor; None where there are new values."""
        return None if name in self.changes else self.base.stored_as(name)


class HeadRepair:
    """Fits output projections, layer after layer; `changes` and `told` hold what came of it.

    `told` has a line for each layer: errors are shares of the mean square of its output.
    """

    def __init__(self, stream: LayerStream, ridge: float, dtype: torch.dtype | None) -> None:
        """`dtype` is what will be written, by default each tensor's own: later layers see that."""
        self._stream, self._ridge, self._dtype = stream, ridge, dtype
        self.changes: dict[str, Change] = {}
        self.told: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, scored: Sequence[LayerScores], chosen: HeadMap) -> None:
        """Fit the layers that lose the heads `chosen`, in the order of the model."""
        layers, last = {scores.heads.layer: scores for scores in scored}, max(chosen)
        for index in range(last + 1):
            model = self._stream.open(index)
            read = self._stream.mixed(model)
            if index in chosen:
                moments = InputMoments.of(read)
                self._fit(model, layers[index], chosen[index], moments)
            if index < last:
                self._stream.go_on(self._stream.finished(model, read))
            del model, read

    def _fit(
        self, model: Decoder, scores: LayerScores, going: Sequence[int], moments: InputMoments
    ) -> None:
        heads, linear = scores.heads, lone_output(model)[1]
        given = Regression(self._read(heads, "weight").double(), moments, self._ridge, False)
        if linear.bias is not None:
            given = replace(given, centred=True)
        out = heads.output_columns(going)
        stay = heads.output_columns(scores.active - set(going))
        values, shift = repaired(given, stay, out)
        after = given.weight.clone()
        after[:, stay], after[:, out] = values, 0.0
        dtype = self._dtype or self._stream.source.dtype(self._name(heads, "weight"))
        change = Change(after[:, stay].to(dtype), stay)
        self.changes[self._name(heads, "weight")] = change
        after[:, stay] = change.values.double()
        linear.set_weight(after.to(model.device, model.dtype))
        if linear.bias is not None:
            bias = (self._read(heads, "bias").double() + shift).to(dtype)
            self.changes[self._name(heads, "bias")] = Change(bias)
            linear.bias.data.copy_(bias)
        self.told.append({"layer": heads.layer} | errors_of(given, out, given.weight - after))

    def _name(self, heads: HeadSlices, leaf: str) -> str:
        """The name in the file of the output projection's weight or bias."""
        path = f"{heads.module(heads.output)}.{leaf}"
        return path_in_file(self._stream.source.config, path)

    def _read(self, heads: HeadSlices, leaf: str) -> Tensor:
        return self._stream.source.tensor(self._name(heads, leaf)).to(self._stream.device)


def errors_of(given: Regression, out: Tensor, difference: Tensor) -> dict[str, float]:
    """What removal alone would change of the layer's output, and what is changed of it now."""
    second = given.moments.second(given.centred)

    def size(weight: Tensor, inner: Tensor) -> float:
        return float(((weight @ inner) * weight).sum())

    whole = max(size(given.weight, second), torch.finfo(torch.float64).tiny)
    alone = size(given.weight[:, out], second[out][:, out])
    return {
        "error_removed": alone / whole,
        "error_repaired": size(difference, second) / whole,
    }
